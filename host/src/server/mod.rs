//! HTTP, JSON and server-sent events.
