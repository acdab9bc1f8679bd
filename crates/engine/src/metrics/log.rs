//! Lines of a log, ours or MaxText's, read back: the least that is left of a run, with three decimals.

use super::history::{EvalRow, METRICS, Metric, Record, Row};

/// What a line of a log says, if it is one of those that metrics print. Whatever stands before is passed over.
pub(super) fn parse(line: &[u8]) -> Option<Record> {
    let line = std::str::from_utf8(line).ok()?;
    // Of a line that was cut off, the last figure may have been longer.
    let line = if line.ends_with('\n') { line } else { line.rsplit_once(", ")?.0 };
    if let Some((_, rest)) = line.split_once("completed step: ") {
        return step(rest).map(Record::Step);
    }
    let (_, rest) = line.split_once("Completed eval after train step ")?;
    let mut parts = rest.trim_end().split(", ");
    let step = parts.next()?.parse().ok()?;
    let mut eval = EvalRow { step, loss: f64::NAN, seconds: None };
    let mut found = false;
    for (name, value) in parts.filter_map(|part| part.split_once('=')) {
        match name {
            "loss" => (eval.loss, found) = (value.parse().ok()?, true),
            "seconds" => eval.seconds = value.parse().ok(),
            _ => {}
        }
    }
    found.then_some(Record::Eval(eval))
}

fn step(rest: &str) -> Option<Row> {
    let mut parts = rest.trim_end().split(", ");
    let step = parts.next()?.parse().ok()?;
    let mut values = [None; METRICS];
    for (name, value) in parts.filter_map(|part| part.split_once(": ")) {
        let (metric, unit, factor) = match name {
            "loss" => (Metric::Loss, "", 1.0),
            "learning_rate" => (Metric::LearningRate, "", 1.0),
            "raw_grad_norm" => (Metric::RawGradNorm, "", 1.0),
            "Tokens/s/device" => (Metric::TokensPerSecond, "", 1.0),
            "TFLOP/s/device" => (Metric::TflopsPerSecond, "", 1.0),
            "MFU" => (Metric::Mfu, "%", 0.01),
            "memory" => (Metric::MemoryBytes, " GB", 1e9),
            "seconds" => (Metric::Seconds, "", 1.0),
            // Waiting for data is not taken: only steps that waited long tell it, and a sum would be too small.
            _ => continue,
        };
        values[metric as usize] = value.strip_suffix(unit).and_then(|v| v.parse::<f64>().ok()).map(|v| v * factor);
    }
    values[Metric::Skipped as usize] = Some(f64::from(u8::from(rest.trim_end().ends_with(", update skipped"))));
    values[Metric::Loss as usize].is_some().then_some(Row { step, wall_time: None, values })
}

#[cfg(test)]
mod tests {
    use super::super::step::tests::sample;
    use super::super::{EvalMetrics, StepMetrics};
    use super::*;

    fn step_of(line: &str) -> Option<Row> {
        match parse(format!("{line}\n").as_bytes()) {
            Some(Record::Step(row)) => Some(row),
            _ => None,
        }
    }

    #[test]
    fn our_own_line() {
        let row = step_of(&StepMetrics { data_wait_seconds: 0.1, skipped: true, ..sample(7) }.line()).unwrap();
        for (metric, value) in [
            (Metric::Loss, 8.917),
            (Metric::LearningRate, 3e-5),
            (Metric::RawGradNorm, 306.79),
            (Metric::TokensPerSecond, 1024.0),
            (Metric::TflopsPerSecond, 0.064),
            (Metric::Mfu, 0.2),
            (Metric::MemoryBytes, 2.512e9),
            (Metric::Seconds, 0.25),
            (Metric::Skipped, 1.0),
        ] {
            assert!((row.get(metric).unwrap() - value).abs() <= 1e-9 * value, "{metric:?}: {row:?}");
        }
        let mut eval = EvalMetrics::begin(9);
        eval.add(20.0, 10.0, 0.0, 0.5);
        let Some(Record::Eval(row)) = parse((eval.line() + "\n").as_bytes()) else { panic!() };
        assert_eq!(row, EvalRow { step: 9, loss: 2.0, seconds: Some(0.5) });
    }

    #[test]
    fn lines_of_maxtext() {
        let row = step_of(
            "I1124 12:31:31.019472 140195656625024 metric_logger.py:230] completed step: 6, seconds: 0.866, \
             TFLOP/s/device: 0.016, Tokens/s/device: 295.509, total_weights: 256, loss: nan, lm_loss: nan, \
             perplexity: nan",
        )
        .unwrap();
        assert_eq!((row.step, row.get(Metric::Seconds), row.get(Metric::Mfu)), (6, Some(0.866), None));
        assert!(row.get(Metric::Loss).unwrap().is_nan());
        // During a rise of the batch size there are no rates.
        let row =
            step_of("[Rampup Batch Size Phase], completed step: 1, seconds: 2.000, total_weights: 8, loss: 3.000");
        let torn = "completed step: 4, seconds: 2.000, loss: 12.125, lm_loss: 1";
        assert!(matches!(parse(torn.as_bytes()), Some(Record::Step(r)) if r.get(Metric::Loss) == Some(12.125)));
        assert!(parse(&torn.as_bytes()[..torn.len() - 14]).is_none());
        assert_eq!(row.unwrap().get(Metric::TokensPerSecond), None);
        let eval = "x] Completed eval after train step 3, loss=8.133, perplexity=3404.734, total_weights=512.0";
        assert!(matches!(parse(eval.as_bytes()), Some(Record::Eval(e)) if e.step == 3 && e.loss == 8.133));
        for other in
            ["Completed eval step: 0, seconds: 1.0, running loss=8.1", "completed step: x, loss: 1", "", "loss: 1"]
        {
            assert!(parse(other.as_bytes()).is_none(), "{other}");
        }
    }
}
