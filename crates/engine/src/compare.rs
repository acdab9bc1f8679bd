//! How far two sets of logits or hidden states are apart, in `f64`.

use serde::Serialize;

/// Ranks compared as "top k".
pub const TOP_K: usize = 10;

/// One token's logits against the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenDistance {
    /// KL(reference || ours), natural logarithm, over the whole vocabulary.
    pub kl: f64,
    /// Largest absolute difference of a logit.
    pub max_abs: f64,
    /// Mean absolute difference.
    pub mean_abs: f64,
    /// Whether both have the same most likely token.
    pub top1: bool,
    /// Tokens that both have among their [`TOP_K`] most likely.
    pub top_k: usize,
}

impl TokenDistance {
    /// Compares one row. A value that is not finite makes every distance infinite: it must never pass a gate.
    #[must_use]
    pub fn new(reference: &[f32], ours: &[f32]) -> Self {
        let finite = reference.iter().chain(ours).all(|x| x.is_finite());
        if !finite || reference.len() != ours.len() || reference.is_empty() {
            let inf = f64::INFINITY;
            return TokenDistance { kl: inf, max_abs: inf, mean_abs: inf, top1: false, top_k: 0 };
        }
        let (zr, zo) = (log_sum_exp(reference), log_sum_exp(ours));
        let (mut kl, mut max_abs, mut sum_abs) = (0.0f64, 0.0f64, 0.0f64);
        for (&r, &o) in reference.iter().zip(ours) {
            let (r, o) = (f64::from(r), f64::from(o));
            let lr = r - zr;
            kl += lr.exp() * (lr - (o - zo));
            let d = (r - o).abs();
            max_abs = max_abs.max(d);
            sum_abs += d;
        }
        let (a, b) = (top(reference), top(ours));
        TokenDistance {
            // KL is never negative; rounding can make it so by 1e-17.
            kl: kl.max(0.0),
            max_abs,
            mean_abs: sum_abs / reference.len() as f64,
            top1: a.first() == b.first(),
            top_k: a.iter().filter(|i| b.contains(i)).count(),
        }
    }
}

/// ln of the sum of exponentials.
pub(crate) fn log_sum_exp(x: &[f32]) -> f64 {
    let max = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if !max.is_finite() {
        return max;
    }
    max + x.iter().map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln()
}

/// Indices of the largest values, largest first; ties go to the lower index.
fn top(x: &[f32]) -> Vec<usize> {
    let mut best: Vec<usize> = Vec::with_capacity(TOP_K + 1);
    for (i, &v) in x.iter().enumerate() {
        if best.len() == TOP_K && v <= x[best[TOP_K - 1]] {
            continue;
        }
        let at = best.partition_point(|&j| x[j] >= v);
        best.insert(at, i);
        best.truncate(TOP_K);
    }
    best
}

/// Distances of many tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Tokens compared.
    pub tokens: usize,
    /// Largest KL of a token.
    pub max_kl: f64,
    /// Mean KL.
    pub mean_kl: f64,
    /// Largest absolute difference of a logit.
    pub max_abs_diff: f64,
    /// Mean absolute difference.
    pub mean_abs_diff: f64,
    /// Share of tokens with the same most likely next token.
    pub top1_agreement: f64,
    /// Mean share of the [`TOP_K`] most likely that both have.
    pub top10_agreement: f64,
}

impl Summary {
    /// Sums up. Nothing compared is an infinite distance, not agreement.
    #[must_use]
    pub fn new(tokens: &[TokenDistance], vocab_size: usize) -> Self {
        if tokens.is_empty() {
            let inf = f64::INFINITY;
            return Summary {
                tokens: 0,
                max_kl: inf,
                mean_kl: inf,
                max_abs_diff: inf,
                mean_abs_diff: inf,
                top1_agreement: 0.0,
                top10_agreement: 0.0,
            };
        }
        let n = tokens.len() as f64;
        let max = |f: fn(&TokenDistance) -> f64| tokens.iter().map(f).fold(0.0, f64::max);
        let mean = |f: fn(&TokenDistance) -> f64| tokens.iter().map(f).sum::<f64>() / n;
        Summary {
            tokens: tokens.len(),
            max_kl: max(|t| t.kl),
            mean_kl: mean(|t| t.kl),
            max_abs_diff: max(|t| t.max_abs),
            mean_abs_diff: mean(|t| t.mean_abs),
            top1_agreement: mean(|t| f64::from(u8::from(t.top1))),
            top10_agreement: mean(|t| t.top_k as f64) / TOP_K.min(vocab_size).max(1) as f64,
        }
    }
}

/// One named intermediate value against the reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TraceDistance {
    /// Its name: `hidden.3`.
    pub name: String,
    /// Largest absolute difference.
    pub max_abs_diff: f64,
    /// Largest absolute value of the reference.
    pub reference_max: f64,
    /// The first over the second: what tolerances are stated in.
    pub relative: f64,
    /// Whether it is within tolerance.
    pub within: bool,
}

impl TraceDistance {
    /// Compares values of the same positions.
    #[must_use]
    pub fn new(name: &str, reference: &[f64], ours: &[f64], tolerance: f64) -> Self {
        let finite = reference.len() == ours.len() && reference.iter().chain(ours).all(|x| x.is_finite());
        let (max_abs_diff, reference_max) = if finite {
            let diff = reference.iter().zip(ours).map(|(r, o)| (r - o).abs()).fold(0.0, f64::max);
            (diff, reference.iter().map(|r| r.abs()).fold(0.0, f64::max))
        } else {
            (f64::INFINITY, 0.0)
        };
        let relative = if max_abs_diff == 0.0 { 0.0 } else { max_abs_diff / reference_max };
        TraceDistance { name: name.to_owned(), max_abs_diff, reference_max, relative, within: relative <= tolerance }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_are_at_distance_zero() {
        let x: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
        let d = TokenDistance::new(&x, &x);
        assert_eq!(d, TokenDistance { kl: 0.0, max_abs: 0.0, mean_abs: 0.0, top1: true, top_k: TOP_K });
    }

    #[test]
    fn kl_of_two_coins_is_the_textbook_value() {
        // p = (3/4, 1/4), q = (1/2, 1/2)
        let d = TokenDistance::new(&[3f32.ln(), 0.0], &[0.0, 0.0]);
        let expected = 0.75 * (0.75f64 / 0.5).ln() + 0.25 * (0.25f64 / 0.5).ln();
        assert!((d.kl - expected).abs() < 1e-7, "{} {expected}", d.kl);
        assert!(d.top1);
    }

    #[test]
    fn a_shift_of_all_logits_is_no_divergence_but_a_difference() {
        let x = [1.0f32, 2.0, 3.0];
        let d = TokenDistance::new(&x, &x.map(|v| v + 1.0));
        assert!(d.kl < 1e-15 && (d.max_abs - 1.0).abs() < 1e-6);
    }

    #[test]
    fn nan_never_passes() {
        assert_eq!(TokenDistance::new(&[1.0, 2.0], &[1.0, f32::NAN]).kl, f64::INFINITY);
        assert_eq!(TokenDistance::new(&[1.0], &[1.0, 2.0]).kl, f64::INFINITY);
        assert_eq!(Summary::new(&[], 8).max_kl, f64::INFINITY);
        assert!(!TraceDistance::new("x", &[1.0], &[f64::NAN], 1.0).within);
        assert!(!TraceDistance::new("x", &[0.0], &[0.1], 1.0).within);
    }

    #[test]
    fn top_is_ordered_and_stable() {
        assert_eq!(top(&[1.0, 3.0, 3.0, 2.0]), [1, 2, 3, 0]);
        let x: Vec<f32> = (0..40).map(|i| ((i * 17) % 40) as f32).collect();
        let t = top(&x);
        assert!(t.len() == TOP_K && t.windows(2).all(|w| x[w[0]] > x[w[1]]) && x[t[0]] == 39.0);
    }
}
