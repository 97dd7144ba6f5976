//! What the server says about itself: health, version, models. From memory only, so it answers under full load.

use hyper::{Response, StatusCode};
use serde_json::json;

use super::error::ApiError;
use super::http::{Body, Server, json_response};

pub(super) fn health(server: &Server) -> Response<Body> {
    let (status, model) = (server.app.engine.status(), &server.app.model);
    let draining = server.is_draining();
    let healthy = status.healthy && !draining;
    let reason = if draining { Some("the server is shutting down".to_owned()) } else { status.failure };
    let mut response = json_response(&json!({
        "status": if healthy { "healthy" } else { "unhealthy" },
        "reason": reason,
        "model": model.id,
        "device": model.device,
        "dtype": model.dtype,
        "resident": status.resident,
        "vram_bytes_used": status.device_bytes_used,
        "context_length": model.context_tokens,
        "vocab_size": model.vocab_size,
        "tokenizer_kind": "hf-json",
        "uptime_seconds": server.started.elapsed().as_secs(),
        "running": status.running,
        "waiting": status.waiting,
        "waiting_tokens": status.waiting_tokens,
        "kv_pages_total": status.pages.total,
        "kv_pages_held": status.pages.held,
        "kv_pages_cached": status.pages.idle,
        "kv_pages_high_water": status.pages.high_water,
        "prefix_cache_hits": status.pages.hits,
        "prefix_cache_misses": status.pages.misses,
        "preemptions": status.preemptions,
    }));
    if !healthy {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

pub(super) fn version(server: &Server) -> Response<Body> {
    json_response(&json!({"version": env!("CARGO_PKG_VERSION"), "fingerprint": server.app.model.fingerprint}))
}

/// Empty unless the model can be used now: routers take the list for readiness.
pub(super) fn models(server: &Server) -> Response<Body> {
    let ready = server.app.engine.status().healthy && !server.is_draining();
    let data = if ready { vec![model_object(server)] } else { Vec::new() };
    json_response(&json!({"object": "list", "data": data}))
}

pub(super) fn model(server: &Server, id: &str) -> Result<Response<Body>, ApiError> {
    if id == server.app.model.id {
        Ok(json_response(&model_object(server)))
    } else {
        Err(ApiError::unknown_model(id, &server.app.model.id))
    }
}

fn model_object(server: &Server) -> serde_json::Value {
    let model = &server.app.model;
    json!({
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "lockstep",
        "max_model_len": model.context_tokens,
    })
}
