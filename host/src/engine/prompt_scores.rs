//! Log-probabilities of prompts: the rows of a step that choose no token but are wanted for themselves.

use std::collections::BTreeMap;

use super::TokenEvent;
use super::batch::Batch;
use super::client::Client;
use super::sampler::Sampler;
use super::scheduler::Scheduler;
use super::sequence::SequenceId;
use crate::device::{DeviceError, Slice};

/// Gives each client the log-probabilities of its prompt's tokens behind the rows that `batch` scored. `logits` \[R, V\]
/// are of those rows.
pub(super) fn deliver(
    batch: &Batch,
    scheduler: &Scheduler,
    clients: &mut BTreeMap<SequenceId, Client>,
    sampler: &mut Sampler,
    logits: &Slice<'_, f32>,
) -> Result<(), DeviceError> {
    let mut tokens = Vec::new();
    let mut most = 0;
    for scores in batch.scores() {
        // Nobody leaves during a step.
        let (Some(sequence), Some(client)) = (scheduler.sequence(scores.id), clients.get(&scores.id)) else {
            return Err(DeviceError::Unknown(format!("sequence {} has no client", scores.id)));
        };
        tokens.extend_from_slice(&sequence.tokens[scores.positions.start + 1..=scores.positions.end]);
        most = most.max(client.prompt_logprobs().unwrap_or(0));
    }
    let mut scored = sampler.score(logits, &tokens, most)?.into_iter();
    for scores in batch.scores() {
        let Some(client) = clients.get_mut(&scores.id) else { continue };
        let wanted = client.prompt_logprobs().unwrap_or(0) as usize;
        client.take_scores(scored.by_ref().take(scores.positions.len()).map(|mut sampled| {
            sampled.top.truncate(wanted);
            TokenEvent { id: sampled.id.unwrap_or(u32::MAX), logprob: sampled.logprob, top: sampled.top }
        }));
    }
    Ok(())
}
