//! From values to positions: ranges, round ticks, and what is written beside them.

/// How values of a chart are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// As they are.
    Plain,
    /// With `k`, `M`, `G`.
    Count,
    /// A share from 0 to 1, in percent.
    Percent,
    /// In MB, GB or TB, which the title names.
    Bytes,
}

/// An axis.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    /// The ends; their logarithms to base 10 on a logarithmic axis.
    low: f64,
    high: f64,
    log: bool,
    unit: Unit,
    /// The values at which a line is drawn and a figure written.
    pub(super) ticks: Vec<f64>,
    /// Distance of ticks where it is even.
    step: f64,
}

impl Axis {
    /// An axis of steps: whole numbers, no margin.
    pub(super) fn steps(low: f64, high: f64) -> Self {
        // A single step stands in the middle.
        let (low, high) = if low < high { (low, high) } else { (low - 1.0, low + 1.0) };
        let mut axis = Axis { low, high, log: false, unit: Unit::Count, ticks: Vec::new(), step: 0.0 };
        axis.even_ticks(8.0, 1.0);
        axis.ticks.retain(|t| *t >= 0.0);
        axis
    }

    /// An axis of values, with a margin. `from_zero` begins at 0 where no value is below.
    pub(super) fn values(low: f64, high: f64, unit: Unit, from_zero: bool) -> Self {
        let [low, high] = [low, high].map(|v| if v.abs() < TINY { 0.0 } else { v });
        // Values that differ by rounding alone are one value: a tick between them could not be told from its neighbour.
        let same = high - low <= 1e-9 * low.abs().max(high.abs());
        let margin = match (same, low.abs().max(high.abs())) {
            (true, size) if size > 0.0 => 0.1 * size,
            (true, _) => 1.0,
            (false, _) => 0.05 * (high - low),
        };
        let bottom = if low >= 0.0 && (from_zero || low - margin < 0.0) { 0.0 } else { low - margin };
        let mut axis = Axis { low: bottom, high: high + margin, log: false, unit, ticks: Vec::new(), step: 0.0 };
        axis.even_ticks(7.0, 0.0);
        axis
    }

    /// A logarithmic axis of values above 0.
    pub(super) fn log(low: f64, high: f64, unit: Unit) -> Self {
        let (low, high) = (low.log10(), high.log10());
        let margin = (0.05 * (high - low)).max(0.01);
        let mut axis = Axis { low: low - margin, high: high + margin, log: true, unit, ticks: Vec::new(), step: 0.0 };
        let decades = axis.high - axis.low;
        if decades < 0.6 {
            // Too narrow for 1, 2, 5.
            let mut even = Axis { low: 10f64.powf(axis.low), high: 10f64.powf(axis.high), log: false, ..axis.clone() };
            even.even_ticks(7.0, 0.0);
            (axis.ticks, axis.step) = (even.ticks, even.step);
            return axis;
        }
        let (first, last) = (axis.low.floor() as i32, axis.high.ceil() as i32);
        let every = (f64::from(last - first) / 8.0).ceil().max(1.0) as i32;
        let digits: &[f64] = if decades <= 3.0 { &[1.0, 2.0, 5.0] } else { &[1.0] };
        for exponent in (first..=last).filter(|e| e % every == 0) {
            axis.ticks.extend(digits.iter().map(|d| decimal(*d, exponent)));
        }
        axis.ticks.retain(|t| (0.0..=1.0).contains(&((t.log10() - axis.low) / decades)));
        axis
    }

    /// About `wanted` ticks at 1, 2 or 5 times a power of ten, no closer than `least`.
    fn even_ticks(&mut self, wanted: f64, least: f64) {
        let raw = ((self.high - self.low) / wanted).max(f64::MIN_POSITIVE);
        let exponent = raw.log10().floor() as i32;
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|digit| decimal(digit, exponent))
            .find(|s| *s >= raw)
            .unwrap_or(raw)
            .max(least);
        // Multiples, not sums: no rounding piles up.
        let (first, last) = ((self.low / step).ceil(), (self.high / step).floor());
        let count = (last - first).clamp(0.0, 100.0) as usize;
        self.ticks = (0..=count).map(|i| (first + i as f64) * step).collect();
        self.step = step;
    }

    /// Where a value lies, from 0 to 1.
    pub(super) fn position(&self, value: f64) -> f64 {
        let value = if self.log { value.log10() } else { value };
        (value - self.low) / (self.high - self.low)
    }

    /// Whether a value can be shown at all.
    pub(super) fn shows(&self, value: f64) -> bool {
        is_drawable(value) && (!self.log || value > TINY)
    }

    /// Largest size on the axis.
    fn size(&self) -> f64 {
        if self.log { 10f64.powf(self.high) } else { self.low.abs().max(self.high.abs()) }
    }

    /// What the title adds to name the unit.
    pub(super) fn unit_name(&self) -> &'static str {
        match self.unit {
            Unit::Bytes => byte_unit(self.size()).1,
            Unit::Percent => "%",
            Unit::Plain | Unit::Count => "",
        }
    }

    /// The figure at a tick.
    pub(super) fn label(&self, tick: f64) -> String {
        let (divisor, suffix) = match self.unit {
            Unit::Plain => (1.0, ""),
            Unit::Percent => (0.01, ""),
            Unit::Bytes => (byte_unit(self.size()).0, ""),
            Unit::Count => match self.size() {
                s if s >= 1e9 => (1e9, "G"),
                s if s >= 1e6 => (1e6, "M"),
                s if s >= 1e4 => (1e3, "k"),
                _ => (1.0, ""),
            },
        };
        if tick == 0.0 {
            return "0".to_owned();
        }
        let value = tick / divisor;
        if self.step == 0.0 {
            return if (1e-3..1e5).contains(&value) {
                format!("{value}{suffix}")
            } else {
                format!("{value:e}{suffix}")
            };
        }
        let step = self.step / divisor;
        let size = self.size() / divisor;
        if suffix.is_empty() && !(1e-3..1e6).contains(&size) {
            // One exponent for all, so that they compare at a glance.
            let exponent = size.log10().floor();
            let power = 10f64.powf(exponent);
            let decimals = places(step / power);
            return format!("{:.decimals$}e{exponent}", value / power);
        }
        let decimals = places(step);
        format!("{value:.decimals$}{suffix}")
    }
}

/// Below this a number counts as zero: powers of ten close to the least number are zero themselves.
pub(super) const TINY: f64 = 1e-290;

/// Whether a value is a number with room around it: differences of the very largest are not finite any more.
pub(super) fn is_drawable(value: f64) -> bool {
    value.abs() < 1e300
}

/// Decimals that tell multiples of a step apart.
fn places(step: f64) -> usize {
    // A step of 0.1 must not come out as 0.09999.
    let exponent = (step * (1.0 + 1e-9)).log10().floor();
    (-exponent).clamp(0.0, 12.0) as usize
}

/// `digit` times a power of ten, as near as a number can be.
fn decimal(digit: f64, exponent: i32) -> f64 {
    if exponent >= 0 { digit * 10f64.powi(exponent) } else { digit / 10f64.powi(-exponent) }
}

fn byte_unit(size: f64) -> (f64, &'static str) {
    match size {
        s if s >= 1e12 => (1e12, "TB"),
        s if s >= 1e9 => (1e9, "GB"),
        _ => (1e6, "MB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|t| axis.label(*t)).collect()
    }

    #[test]
    fn round_ticks() {
        for (axis, expected) in [
            (Axis::steps(0.0, 19.0), &["0", "5", "10", "15"][..]),
            (Axis::steps(0.0, 1.0), &["0", "1"]),
            (Axis::steps(7.0, 7.0), &["6", "7", "8"]),
            (Axis::steps(0.0, 99_999.0), &["0", "20k", "40k", "60k", "80k"]),
            (Axis::values(8.0, 8.9, Unit::Plain, false), &["8.0", "8.2", "8.4", "8.6", "8.8"]),
            (
                Axis::values(0.0, 3e-5, Unit::Plain, true),
                &["0", "0.5e-5", "1.0e-5", "1.5e-5", "2.0e-5", "2.5e-5", "3.0e-5"],
            ),
            (Axis::values(0.0, 0.41, Unit::Percent, true), &["0", "10", "20", "30", "40"]),
            (Axis::values(2.5e9, 2.76e9, Unit::Bytes, true), &["0", "0.5", "1.0", "1.5", "2.0", "2.5"]),
            (Axis::values(0.0, 36_000.0, Unit::Count, true), &["0", "10k", "20k", "30k"]),
            (Axis::values(5.0, 5.0, Unit::Plain, false), &["4.6", "4.8", "5.0", "5.2", "5.4"]),
            (Axis::values(0.0, 0.0, Unit::Plain, false), &["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
            (Axis::values(-2.0, 2.0, Unit::Plain, false), &["-2", "-1", "0", "1", "2"]),
            (Axis::log(1.2, 306.0, Unit::Plain), &["1", "2", "5", "10", "20", "50", "100", "200"]),
            (Axis::log(1e-6, 1e6, Unit::Plain), &["1e-6", "1e-4", "0.01", "1", "100", "10000", "1e6"]),
            (Axis::log(2.0, 2.5, Unit::Plain), &["2.0", "2.1", "2.2", "2.3", "2.4", "2.5"]),
        ] {
            assert_eq!(labels(&axis), expected, "{axis:?}");
        }
    }

    #[test]
    fn positions() {
        let axis = Axis::steps(10.0, 20.0);
        assert_eq!([10.0, 15.0, 20.0].map(|v| axis.position(v)), [0.0, 0.5, 1.0]);
        let axis = Axis::log(1.0, 100.0, Unit::Plain);
        assert!((axis.position(10.0) - 0.5).abs() < 1e-9);
        assert!(!axis.shows(0.0) && !axis.shows(f64::NAN) && axis.shows(1e9));
    }

    #[test]
    fn odd_ranges_end() {
        for (low, high) in [(1e300, 1.1e300), (1.0, 1.0 + 1e-12), (-1e-320, 1e-320), (0.0, 5e-324), (1e15, 1e15 + 1.0)]
        {
            let axis = Axis::values(low, high, Unit::Plain, false);
            assert!(axis.ticks.len() <= 101, "{axis:?}");
            for tick in labels(&axis) {
                assert!(tick.len() < 40, "{tick}");
            }
            assert!(axis.position(low).is_finite() && axis.position(high) <= 1.0);
        }
    }
}
