//! What `generate` gives to programs.

use engine::generate::{Choice, Finish, Sampling, Timing, Writer};
use serde_json::{Value, json};

use super::Prompt;
use super::setup::Setup;

/// Ids as `--tokens` takes them.
pub(super) fn id_list(ids: &[i32]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Ids separated by commas or spaces.
///
/// # Errors
/// The word that is none.
pub(super) fn parse_ids(text: &str) -> Result<Vec<i32>, String> {
    text.split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| !word.is_empty())
        .map(|word| word.parse::<i32>().map_err(|_| word.to_owned()))
        .collect()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn report(
    logprobs: Option<usize>,
    setup: &Setup,
    sampling: &Sampling,
    stop_ids: &[i32],
    prompts: &[Prompt],
    writers: &[Writer<'_>],
    finishes: &[Finish],
    timing: &Timing,
) -> Value {
    let sequences: Vec<Value> = prompts
        .iter()
        .zip(writers)
        .zip(finishes)
        .map(|((prompt, writer), finish)| {
            let mut out = json!({
                "prompt": prompt.text,
                "prompt_tokens": prompt.ids,
                "tokens": writer.choices.iter().map(|c| c.id).collect::<Vec<_>>(),
                "finish": finish,
            });
            if setup.tokenizer.is_some() {
                out["text"] = writer.response.answer.clone().into();
                out["thinking"] = writer.response.thought.clone().into();
                out["tool_calls"] = json!(writer.response.calls);
                out["bad_tool_calls"] = json!(writer.response.bad_calls);
            }
            if logprobs.is_some() {
                out["logprobs"] = writer.choices.iter().map(|c| logprob(setup, c)).collect();
            }
            out
        })
        .collect();
    json!({
        "model": setup.model.path(),
        "lapidary": env!("CARGO_PKG_VERSION"),
        "dtype": setup.dtype.name(),
        "sampling": {
            "do_sample": sampling.draws(),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "suppress_tokens": sampling.suppress_tokens,
            "seed": sampling.seed,
        },
        "stop_ids": stop_ids,
        "sequences": sequences,
        "timing": {
            "prompt_tokens": timing.prompt_tokens,
            "new_tokens": timing.new_tokens,
            "first_token_seconds": timing.first_token.as_secs_f64(),
            "decode_seconds": timing.decode.as_secs_f64(),
            "tokens_per_second": timing.tokens_per_second(),
        },
    })
}

fn logprob(setup: &Setup, choice: &Choice) -> Value {
    let token = |id: i32| setup.tokenizer.as_ref().and_then(|t| t.token(u32::try_from(id).ok()?));
    let top: Vec<Value> =
        choice.top.iter().map(|(id, logprob)| json!({ "id": id, "token": token(*id), "logprob": logprob })).collect();
    json!({ "id": choice.id, "token": token(choice.id), "logprob": choice.logprob, "top": top })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_either_spelling() {
        assert_eq!(parse_ids("2, 818 5279,\n7").unwrap(), [2, 818, 5279, 7]);
        assert_eq!(parse_ids("2,x").unwrap_err(), "x");
        assert_eq!(parse_ids("").unwrap(), [0i32; 0]);
        assert_eq!(id_list(&[2, 818]), "2,818");
    }
}
