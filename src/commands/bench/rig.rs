//! What all measurements need: an engine, the model's work, the device's ceilings.

use std::cell::Cell;

use host::device::Device;
use host::engine::{Engine, Handle};

use super::arguments::Plan;
use super::ceiling::Ceilings;
use super::decode::Shape;
use super::requests::decoding_length;
use super::work::Work;
use crate::start::Started;

/// An engine to measure.
pub(super) struct Rig {
    started: Started,
    pub(super) plan: Plan,
    pub(super) work: Work,
    pub(super) ceilings: Ceilings,
    salts: Cell<u64>,
}

impl Rig {
    pub(super) fn new(started: Started, plan: Plan, ceilings: Ceilings) -> Self {
        let work = Work::new(started.model.config());
        Self { started, plan, work, ceilings, salts: Cell::new(0) }
    }

    pub(super) fn engine(&self) -> &Handle {
        &self.started.engine
    }

    pub(super) fn device(&self) -> &Device {
        self.started.model.device()
    }

    pub(super) fn vocab(&self) -> usize {
        self.started.model.config().vocab
    }

    /// A salt under which nothing is cached.
    pub(super) fn fresh_salt(&self) -> String {
        self.salts.set(self.salts.get() + 1);
        format!("bench {}", self.salts.get())
    }

    /// Why this shape cannot be measured, if it cannot: all requests must have their pages at once, and keep them.
    pub(super) fn too_large(&self, shape: Shape, tokens: u32) -> Option<String> {
        let (context, most) = (decoding_length(shape.context) + tokens as usize, self.started.model.context_tokens());
        let page = host::ops::PAGE;
        let (needed, pages) = (shape.batch * (context.div_ceil(page) + 1), self.engine().status().pages.total);
        if context > most {
            Some(format!("{context} tokens exceed the model's context of {most}"))
        } else if needed > pages {
            Some(format!("it needs {needed} pages of the KV cache, which has {pages}"))
        } else {
            None
        }
    }

    /// The engine's model, and the engine stopped.
    pub(super) fn into_started(self) -> Started {
        self.started
    }
}
