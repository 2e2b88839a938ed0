//! Bias and penalties: what changes the logits before anything is chosen.

use super::SampleRequest;

/// Writes the changed logits into `work`, if the request changes any; says whether it does.
pub(super) fn apply(logits: &[f32], request: &SampleRequest<'_>, work: &mut [f32]) -> bool {
    let SampleRequest { params, prompt, generated } = *request;
    let repetition = params.repetition_penalty != 1.0 && !(prompt.is_empty() && generated.is_empty());
    let counted = (params.presence_penalty != 0.0 || params.frequency_penalty != 0.0) && !generated.is_empty();
    if params.logit_bias.is_empty() && !repetition && !counted {
        return false;
    }
    work.copy_from_slice(logits);
    for &(token, bias) in &params.logit_bias {
        work[token as usize] += bias;
    }
    if repetition {
        let mut seen = vec![0u64; work.len().div_ceil(64)];
        for &token in prompt.iter().chain(generated) {
            let (word, bit) = (&mut seen[token as usize / 64], 1 << (token % 64));
            if *word & bit == 0 {
                *word |= bit;
                let x = &mut work[token as usize];
                *x = if *x > 0.0 { *x / params.repetition_penalty } else { *x * params.repetition_penalty };
            }
        }
    }
    if counted {
        let mut sorted = generated.to_vec();
        sorted.sort_unstable();
        for run in sorted.chunk_by(|a, b| a == b) {
            let x = &mut work[run[0] as usize];
            *x -= params.frequency_penalty * run.len() as f32;
            *x -= params.presence_penalty;
        }
    }
    // Finite logits near the end of F32 may have been pushed over it; what follows subtracts the largest.
    work.iter_mut().for_each(|x| *x = x.clamp(f32::MIN, f32::MAX));
    true
}
