//! Refuses requests that could not be answered, before they wait.

use super::scheduler::SchedulerLimits;
use super::{Request, Sampling, SubmitError};

/// Refuses what could not be answered.
pub(super) fn check(
    request: &Request,
    context_tokens: usize,
    vocab_size: usize,
    cache: &SchedulerLimits,
) -> Result<(), SubmitError> {
    if request.prompt.is_empty() {
        return Err(SubmitError::EmptyPrompt);
    }
    if request.max_tokens == 0 && request.prompt_logprobs.is_none() {
        return Err(SubmitError::NoTokens);
    }
    if request.min_tokens > request.max_tokens {
        let (value, range) = (request.min_tokens.to_string(), "at most max_tokens");
        return Err(SubmitError::OutOfRange { name: "min_tokens", value, range });
    }
    if request.most_tokens() > context_tokens {
        return Err(SubmitError::TooLong {
            prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens,
            context_tokens,
        });
    }
    let needed_pages = cache.pages_for(request.most_tokens());
    if needed_pages > cache.pages {
        return Err(SubmitError::NeverFits { needed_pages, total_pages: cache.pages, page_tokens: cache.page_tokens });
    }
    let biased = request.sampling.logit_bias.iter().map(|&(id, _)| id);
    if let Some(id) = request.prompt.iter().copied().chain(biased).find(|&id| id as usize >= vocab_size) {
        return Err(SubmitError::UnknownToken { id, vocab_size });
    }
    check_sampling(&request.sampling)
}

fn check_sampling(sampling: &Sampling) -> Result<(), SubmitError> {
    let finite = |name, value: f32, holds: bool, range| {
        if value.is_finite() && holds {
            Ok(())
        } else {
            Err(SubmitError::OutOfRange { name, value: value.to_string(), range })
        }
    };
    let Sampling { temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } = *sampling;
    finite("temperature", temperature, temperature >= 0.0, "0 or more")?;
    finite("top_p", top_p, (0.0..=1.0).contains(&top_p), "0 to 1")?;
    finite("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1")?;
    finite("repetition_penalty", repetition_penalty, repetition_penalty > 0.0, "more than 0")?;
    finite("presence_penalty", presence_penalty, true, "finite")?;
    finite("frequency_penalty", frequency_penalty, true, "finite")?;
    sampling.logit_bias.iter().try_for_each(|&(_, bias)| finite("logit_bias", bias, true, "finite"))
}
