use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Fixture {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    settings: Settings,
    seen: Vec<i32>,
    logits: Vec<f32>,
    greedy: i32,
    probs: BTreeMap<u32, f64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    suppress_tokens: Option<Vec<i32>>,
}

impl Settings {
    fn sampling(self) -> Sampling {
        let plain = Sampling::default();
        Sampling {
            do_sample: true,
            temperature: self.temperature.unwrap_or(plain.temperature),
            top_k: self.top_k.unwrap_or(plain.top_k),
            top_p: self.top_p.unwrap_or(plain.top_p),
            min_p: self.min_p.unwrap_or(plain.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(plain.repetition_penalty),
            suppress_tokens: self.suppress_tokens.unwrap_or_default(),
            seed: 0,
        }
    }
}

fn sampler(sampling: Sampling) -> Sampler {
    Sampler::new(sampling, 0, None).unwrap()
}

/// Probabilities of what stays.
fn distribution(sampler: &Sampler, logits: &[f32]) -> BTreeMap<u32, f64> {
    let mut logits = logits.to_vec();
    sampler.penalise(&mut logits);
    let kept = sampler.kept(&logits);
    let total: f64 = kept.iter().map(|(_, w)| w).sum();
    kept.into_iter().map(|(id, w)| (id, w / total)).collect()
}

/// Made by `scripts/sampling_from_hf.py` with transformers' own processors.
#[test]
fn transformers_leave_the_same_tokens_with_the_same_probabilities() {
    let fixture: Fixture = serde_json::from_str(include_str!("hf.json")).unwrap();
    assert!(fixture.cases.len() > 10);
    for (at, case) in fixture.cases.into_iter().enumerate() {
        let sampling = case.settings.sampling();
        let mut s = sampler(sampling.clone());
        s.observe(&case.seen);
        let ours = distribution(&s, &case.logits);
        assert!(ours.keys().eq(case.probs.keys()), "{at}: {ours:?}\n{:?}", case.probs);
        for (id, p) in &case.probs {
            assert!((ours[id] - p).abs() < 2e-7, "{at}: {id}: {} {p}", ours[id]);
        }
        let mut greedy = sampler(Sampling { do_sample: false, ..sampling });
        greedy.observe(&case.seen);
        assert_eq!(greedy.next(&mut case.logits.clone()).unwrap().id, case.greedy, "{at}");
    }
}

#[test]
fn draws_follow_the_probabilities_and_the_seed_alone() {
    let logits = [1.0f32, 0.0, 2.0, -1.0];
    let sampling = Sampling { do_sample: true, seed: 3, ..Sampling::default() };
    let draw = |sequence: usize, seed: u64| -> Vec<i32> {
        let mut s = Sampler::new(Sampling { seed, ..sampling.clone() }, sequence, None).unwrap();
        (0..20_000).map(|_| s.next(&mut logits.clone()).unwrap().id).collect()
    };
    let first = draw(0, 3);
    assert_eq!(first, draw(0, 3));
    assert_ne!(first, draw(1, 3));
    assert_ne!(first, draw(0, 4));
    for (id, p) in distribution(&sampler(sampling), &logits) {
        let share = first.iter().filter(|x| **x == id as i32).count() as f64 / first.len() as f64;
        // Five standard deviations.
        assert!((share - p).abs() < 5.0 * (p / first.len() as f64).sqrt(), "{id}: {share} {p}");
    }
}

#[test]
fn logprobs_are_the_models_own() {
    let sampling = Sampling { suppress_tokens: vec![2], repetition_penalty: 9.0, ..Sampling::default() };
    let mut s = Sampler::new(sampling, 0, Some(2)).unwrap();
    s.observe(&[1]);
    // Probabilities 1/10, 2/10, 3/10, 4/10 but for a constant.
    let mut logits: Vec<f32> = (1..=4).map(|x| (x as f32).ln() + 5.0).collect();
    let choice = s.next(&mut logits).unwrap();
    assert_eq!(choice.id, 3);
    let close = |a: f32, b: f32| (a - b).abs() < 1e-6;
    assert!(close(choice.logprob.unwrap(), 0.4f32.ln()), "{choice:?}");
    assert_eq!(choice.top.iter().map(|t| t.0).collect::<Vec<_>>(), [3, 2]);
    assert!(close(choice.top[1].1, 0.3f32.ln()), "{choice:?}");
}

#[test]
fn what_cannot_be_chosen_from_is_said() {
    let mut s = sampler(Sampling { suppress_tokens: vec![0, 1], ..Sampling::default() });
    assert!(s.next(&mut [1.0, 2.0]).unwrap_err().to_string().contains("suppressed"));
    assert!(s.next(&mut [1.0, f32::NAN]).unwrap_err().to_string().contains("not a number"));
    let mut s = sampler(Sampling { do_sample: true, suppress_tokens: vec![0, 1], ..Sampling::default() });
    assert!(s.next(&mut [1.0, 2.0]).unwrap_err().to_string().contains("suppressed"));
    assert_eq!(s.next(&mut [1.0, 2.0, f32::INFINITY, 5.0]).unwrap().id, 2);
    // Ids that the model does not have cannot come anyway.
    let mut s = sampler(Sampling { suppress_tokens: vec![-1, 9], repetition_penalty: 2.0, ..Sampling::default() });
    s.observe(&[-5, 77]);
    assert_eq!(s.next(&mut [1.0, 2.0]).unwrap().id, 1);
    let plain = Sampling::default();
    for bad in [
        Sampling { temperature: -1.0, ..plain.clone() },
        Sampling { temperature: f32::NAN, ..plain.clone() },
        Sampling { top_p: 1.5, ..plain.clone() },
        Sampling { min_p: -0.1, ..plain.clone() },
        Sampling { repetition_penalty: 0.0, ..plain },
    ] {
        assert!(Sampler::new(bad.clone(), 0, None).is_err(), "{bad:?}");
    }
}

#[test]
fn temperature_zero_takes_the_most_likely() {
    let mut s = sampler(Sampling { do_sample: true, temperature: 0.0, ..Sampling::default() });
    // Of equal ones, the first.
    assert_eq!(s.next(&mut [1.0, 7.0, 7.0]).unwrap().id, 1);
}

/// Few different values, so that many are equal.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![(-40i16..40).prop_map(|x| f32::from(x) / 4.0), Just(f32::NEG_INFINITY)];
    prop::collection::vec(value, 1..400)
}

proptest! {
    #[test]
    fn largest_is_a_sort(values in logits(), n in 1usize..450) {
        let mut sorted: Vec<(u32, f32)> = (0u32..).zip(values.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        sorted.truncate(n);
        prop_assert_eq!(select::largest(&values, n), sorted);
    }

    #[test]
    fn the_nucleus_is_that_of_a_sort(values in logits(), share in 0.0f64..1.0) {
        let mut kept: Vec<(u32, f64)> = (0u32..).zip(values.iter().map(|v| f64::from(*v).exp())).collect();
        let mut sorted = kept.clone();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let need = share * kept.iter().map(|(_, w)| w).sum::<f64>();
        let mut mass = 0.0;
        let mut expected = Vec::new();
        for (at, (id, w)) in sorted.into_iter().enumerate() {
            if at > 0 && mass >= need {
                break;
            }
            mass += w;
            expected.push(id);
        }
        select::nucleus(&mut kept, share);
        prop_assert_eq!(kept.iter().map(|k| k.0).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_is_drawn_is_what_stays(
        values in logits(),
        temperature in 0.0f32..3.0,
        top_k in 0usize..20,
        top_p in 0.0f32..=1.0,
        min_p in 0.0f32..=1.0,
        seed: u64,
    ) {
        let sampling = Sampling { do_sample: true, temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
        let mut s = sampler(sampling);
        let kept: Vec<u32> = s.kept(&values).into_iter().map(|(id, _)| id).collect();
        match s.next(&mut values.clone()) {
            Ok(choice) => prop_assert!(kept.contains(&(choice.id as u32))),
            Err(_) => prop_assert!(values.iter().all(|v| *v == f32::NEG_INFINITY)),
        }
    }
}
