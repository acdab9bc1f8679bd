//! The learning rate of every step, by MaxText's formula.

use std::f64::consts::PI;

use config::{DecayStyle, Schedule as Keys, ScheduleKind};

/// The course of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    peak: f64,
    last: f64,
    steps: u64,
    warmup: u64,
    /// Steps that decay, for `wsd`.
    decay: Option<(u64, DecayStyle)>,
}

impl Schedule {
    /// From the configuration.
    #[must_use]
    pub fn new(keys: &Keys) -> Self {
        let steps = keys.steps as u64;
        let share = |fraction: f64| (keys.steps as f64 * fraction) as u64;
        Schedule {
            peak: keys.learning_rate,
            last: keys.learning_rate * keys.final_fraction,
            steps,
            warmup: share(keys.warmup_steps_fraction),
            decay: match keys.kind {
                ScheduleKind::Cosine => None,
                ScheduleKind::Wsd => Some((share(keys.wsd_decay_steps_fraction), keys.wsd_decay_style)),
            },
        }
    }

    /// The rate of step `t`, from 0. With warm-up, that of step 0 is 0; beyond the schedule all are.
    #[must_use]
    pub fn rate(&self, t: u64) -> f64 {
        let Schedule { peak, last, steps, warmup, .. } = *self;
        if t >= steps {
            return 0.0;
        }
        if t < warmup {
            return peak * t as f64 / warmup as f64;
        }
        // Both courses reach their end at the last step.
        let cosine = |step: u64, length: u64| {
            let u = if length <= 1 { 1.0 } else { step as f64 / (length - 1) as f64 };
            let a = ((PI * u).cos() + 1.0) / 2.0;
            peak * a + last * (1.0 - a)
        };
        match self.decay {
            None => cosine(t - warmup, steps - warmup),
            Some((decay, style)) => {
                let start = steps.saturating_sub(decay);
                if t < start {
                    return peak;
                }
                match style {
                    DecayStyle::Cosine => cosine(t - start, decay),
                    DecayStyle::Linear => {
                        let u = if decay <= 1 { 1.0 } else { (t - start) as f64 / (decay - 1) as f64 };
                        peak + (last - peak) * u
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(kind: ScheduleKind, steps: usize) -> Keys {
        Keys {
            learning_rate: 1.0,
            kind,
            warmup_steps_fraction: 0.1,
            final_fraction: 0.1,
            steps,
            wsd_decay_steps_fraction: 0.2,
            wsd_decay_style: DecayStyle::Linear,
        }
    }

    #[test]
    fn cosine_warms_up_from_zero_and_ends_at_the_final_fraction() {
        let s = Schedule::new(&keys(ScheduleKind::Cosine, 100));
        assert_eq!(s.rate(0), 0.0);
        assert_eq!(s.rate(5), 0.5);
        assert_eq!(s.rate(10), 1.0);
        assert!((s.rate(99) - 0.1).abs() < 1e-12);
        // Halfway: u = 44.5 / 89
        assert!((s.rate(54) + s.rate(55) - 1.1).abs() < 1e-12);
        assert_eq!(s.rate(100), 0.0);
    }

    #[test]
    fn short_runs_have_no_warm_up() {
        let s = Schedule::new(&keys(ScheduleKind::Cosine, 6));
        assert_eq!(s.rate(0), 1.0);
        assert!((s.rate(5) - 0.1).abs() < 1e-12);
        assert!((Schedule::new(&keys(ScheduleKind::Cosine, 1)).rate(0) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn wsd_holds_then_decays() {
        let s = Schedule::new(&keys(ScheduleKind::Wsd, 100));
        assert_eq!(s.rate(9), 0.9);
        assert!((10..80).all(|t| s.rate(t) == 1.0));
        assert_eq!(s.rate(80), 1.0);
        assert!((s.rate(99) - 0.1).abs() < 1e-12);
        assert!((s.rate(90) - (1.0 - 0.9 * 10.0 / 19.0)).abs() < 1e-12);
    }
}
