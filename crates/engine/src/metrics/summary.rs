//! What a run says before its first step: parameters, work, memory.

use gemma4::Flops;

/// What is known before the first step.
#[derive(Debug, Clone)]
pub struct Summary<'a> {
    /// Name of the model.
    pub model: &'a str,
    /// Parameters.
    pub parameters: ParameterCounts,
    /// Work of a step on one device.
    pub flops: &'a Flops,
    /// Peak rate of a device for the run's operands, in FLOP/s, where it is known.
    pub peak_flops: Option<f64>,
    /// Devices that share the batch.
    pub devices: usize,
    /// Planned memory of one device.
    pub memory: &'a [MemoryRow<'a>],
    /// Memory of one device, in bytes, where it is known.
    pub memory_limit: Option<u64>,
}

/// Parameters, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCounts {
    /// All of them.
    pub total: u64,
    /// Those that training changes.
    pub trainable: u64,
    /// Those in tables that are looked up: tokens and per-layer inputs.
    pub embeddings: u64,
}

/// A line of the memory plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryRow<'a> {
    /// What it is: parameters, optimizer, gradients, activations, logits, batch.
    pub label: &'a str,
    /// How much on one device.
    pub bytes: u64,
    /// What it consists of, or an empty text.
    pub note: &'a str,
}

/// The share of a device's memory beyond which a plan is called tight: programs and fragmentation take some as well.
const TIGHT: f64 = 0.9;

impl Summary<'_> {
    /// Sum of the memory plan, in bytes.
    #[must_use]
    pub fn memory_total(&self) -> u64 {
        self.memory.iter().map(|row| row.bytes).fold(0, u64::saturating_add)
    }
}

/// The summary as lines for a log. MaxText's own lines on parameters and work come first.
#[must_use]
pub fn render(summary: &Summary<'_>) -> String {
    let f = summary.flops;
    let p = &summary.parameters;
    let percent = |part: f64| if f.total > 0.0 { 100.0 * part / f.total } else { 0.0 };
    let mut lines = vec![
        format!("number parameters: {:.3} billion", p.total as f64 / 1e9),
        "Per train step:".to_owned(),
        format!(" Total TFLOPs: {:.2}", f.total / 1e12),
        format!(
            " split as {:.2}% learnable weight flops and {:.2}% attention flops",
            percent(f.learnable),
            percent(f.attention)
        ),
    ];
    let table = tables(summary);
    for (title, rows) in &table {
        lines.push(format!("{title}:"));
        let label = rows.iter().map(|r| r[0].chars().count()).max().unwrap_or(0);
        let value = rows.iter().map(|r| r[1].chars().count()).max().unwrap_or(0);
        for [name, figure, note] in rows {
            lines.push(format!("  {name:label$}  {figure:>value$}  {note}").trim_end().to_owned());
        }
    }
    lines.join("\n")
}

/// The same as Markdown, for TensorBoard's text page.
#[must_use]
pub fn render_markdown(summary: &Summary<'_>) -> String {
    let mut lines = Vec::new();
    for (title, rows) in tables(summary) {
        lines.extend([format!("**{title}**"), String::new(), "| | | |".to_owned(), "|---|---:|---|".to_owned()]);
        lines.extend(rows.iter().map(|[name, figure, note]| format!("| {name} | {figure} | {note} |")));
        lines.push(String::new());
    }
    lines.join("\n")
}

type Row = [String; 3];

fn tables(summary: &Summary<'_>) -> Vec<(String, Vec<Row>)> {
    let mut tables = vec![
        (format!("parameters of {}", summary.model), parameters(&summary.parameters)),
        ("work of a step, per device".to_owned(), work(summary)),
    ];
    if !summary.memory.is_empty() {
        tables.push(("memory planned, per device".to_owned(), memory(summary)));
    }
    tables
}

fn parameters(p: &ParameterCounts) -> Vec<Row> {
    let row = |name: &str, n: u64| [name.to_owned(), grouped(n), share(n as f64, p.total as f64)];
    vec![
        [String::from("total"), grouped(p.total), String::new()],
        row("trainable", p.trainable),
        row("in embeddings", p.embeddings),
    ]
}

fn work(summary: &Summary<'_>) -> Vec<Row> {
    let f = summary.flops;
    let b = &f.breakdown;
    let mut rows = vec![["tokens".to_owned(), grouped(f.tokens), devices(summary.devices, f.tokens)]];
    for (name, value) in [
        ("attention (scores and values)", f.attention),
        ("query and output", b.query_output),
        ("keys and values", b.key_value),
        ("MLPs", b.mlp),
        ("per-layer inputs", b.per_layer_input),
        ("head", b.head),
        ("total", f.total),
    ] {
        rows.push([name.to_owned(), format!("{} TFLOP", figure(value / 1e12)), share(value, f.total)]);
    }
    if let Some(peak) = summary.peak_flops.filter(|p| *p > 0.0) {
        let at = format!("at the peak of {} TFLOP/s", figure(peak / 1e12));
        rows.push(["shortest step".to_owned(), format!("{} s", figure(f.total / peak)), at]);
    }
    rows
}

fn devices(n: usize, tokens: u64) -> String {
    if n > 1 { format!("{} on {n} devices", grouped(tokens.saturating_mul(n as u64))) } else { String::new() }
}

fn memory(summary: &Summary<'_>) -> Vec<Row> {
    let mut rows: Vec<Row> =
        summary.memory.iter().map(|row| [row.label.to_owned(), gigabytes(row.bytes), row.note.to_owned()]).collect();
    let total = summary.memory_total();
    let verdict = summary.memory_limit.map_or_else(String::new, |limit| {
        let part = total as f64 / limit.max(1) as f64;
        let word = match part {
            p if p > 1.0 => "does not fit",
            p if p > TIGHT => "tight",
            _ => "fits",
        };
        format!("{:.1}% of {}: {word}", 100.0 * part, gigabytes(limit))
    });
    rows.push(["total".to_owned(), gigabytes(total), verdict]);
    rows
}

fn share(part: f64, whole: f64) -> String {
    if whole > 0.0 { format!("{:.2}%", 100.0 * part / whole) } else { String::new() }
}

/// Four digits that matter, no exponent for the sizes that occur.
fn figure(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let digits = 3 - value.abs().log10().floor() as i32;
    let digits = usize::try_from(digits.clamp(0, 12)).unwrap_or(0);
    format!("{value:.digits$}")
}

/// Powers of ten, as the rest of the program has them.
fn gigabytes(bytes: u64) -> String {
    match bytes {
        b if b < 10_000_000 => format!("{:.3} MB", b as f64 / 1e6),
        b => format!("{:.3} GB", b as f64 / 1e9),
    }
}

/// A count with thin groups: `4,628,569,379`.
#[must_use]
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use config::Sources;
    use gemma4::Arch;

    use super::*;

    fn with_summary(limit: Option<u64>, check: impl FnOnce(&Summary<'_>)) {
        let config = Sources::from_args(["model_name=gemma4-e2b".to_owned()]).resolve().unwrap();
        let arch = Arch::from_config(&config).unwrap();
        let flops = Flops::training_step(&arch, 1.0, 2048, 1);
        let memory = [
            MemoryRow { label: "parameters", bytes: 18_514_277_516, note: "float32" },
            MemoryRow { label: "optimizer", bytes: 37_028_555_032, note: "mu and nu, float32" },
            MemoryRow { label: "batch", bytes: 65_536, note: "" },
        ];
        check(&Summary {
            model: "gemma4-e2b",
            parameters: ParameterCounts { total: 4_628_569_379, trainable: 4_628_569_379, embeddings: 2_751_463_424 },
            flops: &flops,
            peak_flops: Some(197e12),
            devices: 4,
            memory: &memory,
            memory_limit: limit,
        });
    }

    const LINES: &str = "\
number parameters: 4.629 billion
Per train step:
 Total TFLOPs: 29.36
 split as 95.39% learnable weight flops and 4.61% attention flops
parameters of gemma4-e2b:
  total          4,628,569,379
  trainable      4,628,569,379  100.00%
  in embeddings  2,751,463,424  59.45%
work of a step, per device:
  tokens                                2,048  8,192 on 4 devices
  attention (scores and values)   1.353 TFLOP  4.61%
  query and output                3.247 TFLOP  11.06%
  keys and values                0.1739 TFLOP  0.59%
  MLPs                            19.13 TFLOP  65.16%
  per-layer inputs               0.5073 TFLOP  1.73%
  head                            4.948 TFLOP  16.85%
  total                           29.36 TFLOP  100.00%
  shortest step                      0.1491 s  at the peak of 197.0 TFLOP/s
memory planned, per device:
  parameters  18.514 GB  float32
  optimizer   37.029 GB  mu and nu, float32
  batch        0.066 MB
  total       55.543 GB  92.6% of 60.000 GB: tight";

    #[test]
    fn lines() {
        with_summary(Some(60_000_000_000), |s| assert_eq!(render(s), LINES));
    }

    #[test]
    fn verdicts() {
        for (limit, word) in [(30_000_000_000, "does not fit"), (80_000_000_000, "fits")] {
            with_summary(Some(limit), |s| assert!(render(s).ends_with(word)));
        }
        with_summary(None, |s| assert!(render(s).ends_with("total       55.543 GB")));
    }

    #[test]
    fn markdown_has_the_same_figures() {
        with_summary(None, |s| {
            let text = render_markdown(s);
            assert!(
                text.contains("| total | 4,628,569,379 |  |") && text.contains("| optimizer | 37.029 GB |"),
                "{text}"
            );
        });
    }

    #[test]
    fn figures() {
        for (value, text) in [(29.363_08, "29.36"), (0.001_234_56, "0.001235"), (123_456.0, "123456"), (0.0, "0")] {
            assert_eq!(figure(value), text);
        }
        assert_eq!(gigabytes(65_536), "0.066 MB");
    }
}
