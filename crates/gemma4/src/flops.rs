//! Exact floating-point operations of a training step, in MaxText's accounting.
//!
//! A multiply-add counts as two. Causal attention counts half, windows count their exact area, borrowed keys and
//! values cost no projection, doubled MLPs count double, lookups count zero, and a training step is three forward
//! passes. Norms, rotary embedding, softmax and rematerialisation are not counted.

use serde::Serialize;

use crate::Arch;
use crate::arch::LayerKind;

/// Operations of one training step on one device.
#[derive(Debug, Clone, Serialize)]
pub struct Flops {
    /// Tokens of the step: batch x sequence x accumulation steps.
    pub tokens: u64,
    /// Score and value products.
    pub attention: f64,
    /// Products with weights.
    pub learnable: f64,
    /// Both.
    pub total: f64,
    /// The same, split by where it happens.
    pub breakdown: Breakdown,
    /// Layer by layer.
    pub layers: Vec<LayerFlops>,
}

/// Learnable operations by part of the model.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Breakdown {
    /// Query and output projections.
    pub query_output: f64,
    /// Key and value projections of the layers that own them.
    pub key_value: f64,
    /// Gated MLPs.
    pub mlp: f64,
    /// The projection that makes per-layer inputs, and every layer's gate and projection.
    pub per_layer_input: f64,
    /// The tied head.
    pub head: f64,
}

/// Operations of one layer in the step.
#[derive(Debug, Clone, Serialize)]
pub struct LayerFlops {
    /// Its index.
    pub layer: usize,
    /// Hugging Face's name of its kind.
    pub kind: &'static str,
    /// Whether it projects its own keys and values.
    pub owns_kv: bool,
    /// Score and value products.
    pub attention: f64,
    /// Products with its weights.
    pub learnable: f64,
}

impl Flops {
    /// Operations of a training step: `batch` sequences of `seq` tokens, `accumulation` times over.
    #[must_use]
    pub fn training_step(arch: &Arch, batch: f64, seq: usize, accumulation: usize) -> Self {
        Self::new(arch, batch, seq, 3.0 * accumulation as f64, accumulation)
    }

    /// Operations of one forward pass.
    #[must_use]
    pub fn forward(arch: &Arch, batch: f64, seq: usize) -> Self {
        Self::new(arch, batch, seq, 1.0, 1)
    }

    fn new(arch: &Arch, batch: f64, seq: usize, passes: f64, accumulation: usize) -> Self {
        let s = seq as f64;
        let d = arch.hidden_size() as f64;
        let h = arch.num_heads() as f64;
        let ple = arch.per_layer_input().map_or(0.0, |p| p.width as f64);
        let unit = batch * s * passes; // one multiply-add per token costs twice this
        let mut breakdown = Breakdown::default();
        let mut layers = Vec::with_capacity(arch.layers().len());
        for (index, layer) in arch.layers().iter().enumerate() {
            let e = layer.head_dim as f64;
            let attention = passes
                * match layer.kind {
                    LayerKind::Full => 2.0 * batch * s * s * h * e,
                    LayerKind::Sliding => {
                        let w = arch.spec().sliding_window.min(seq) as f64;
                        4.0 * batch * (s * w - 0.5 * w * w) * h * e
                    }
                };
            let query_output = 4.0 * unit * d * h * e;
            let kv_projections = if !layer.owns_kv() {
                0.0
            } else if layer.k_eq_v {
                1.0
            } else {
                2.0
            };
            let key_value = 2.0 * kv_projections * unit * d * layer.kv_heads as f64 * e;
            let mlp = 6.0 * unit * d * layer.mlp_width as f64;
            let gate = 4.0 * unit * d * ple;
            breakdown.query_output += query_output;
            breakdown.key_value += key_value;
            breakdown.mlp += mlp;
            breakdown.per_layer_input += gate;
            layers.push(LayerFlops {
                layer: index,
                kind: layer.kind.hf_name(),
                owns_kv: layer.owns_kv(),
                attention,
                learnable: query_output + key_value + mlp + gate,
            });
        }
        breakdown.per_layer_input += 2.0 * unit * d * ple * arch.layers().len() as f64;
        breakdown.head = 2.0 * unit * d * arch.vocab_size() as f64;
        let attention = layers.iter().map(|l| l.attention).sum();
        let b = &breakdown;
        let learnable = b.query_output + b.key_value + b.mlp + b.per_layer_input + b.head;
        Flops {
            tokens: (batch * s * accumulation as f64).round() as u64,
            attention,
            learnable,
            total: attention + learnable,
            breakdown,
            layers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::tests::{e2b, e4b};

    /// What MaxText's own function returns, in TFLOP per step on one device.
    const ORACLE: &[(&str, f64, usize, usize, f64, f64, f64)] = &[
        ("e2b", 1.0, 128, 1, 0.008455716864, 1.750635380736, 1.759091097600),
        ("e2b", 1.0, 2048, 1, 1.352914698240, 28.010166091776, 29.363080790016),
        ("e2b", 4.0, 4096, 1, 16.956530884608, 224.081328734208, 241.037859618816),
        ("e2b", 1.0, 8192, 1, 14.340895801344, 112.040664367104, 126.381560168448),
        ("e2b", 12.0, 2048, 1, 16.234976378880, 336.121993101312, 352.356969480192),
        ("e4b", 1.0, 128, 1, 0.009865003008, 3.566500577280, 3.576365580288),
        ("e4b", 1.0, 2048, 1, 1.510754746368, 57.064009236480, 58.574763982848),
        ("e4b", 4.0, 4096, 1, 18.309445582848, 456.512073891840, 474.821519474688),
        ("e4b", 1.0, 8192, 1, 15.039901728768, 228.256036945920, 243.295938674688),
        ("e4b", 12.0, 2048, 1, 18.129056956416, 684.768110837760, 702.897167794176),
        ("e2b", 1.0, 2048, 4, 4.0 * 1.352914698240, 4.0 * 28.010166091776, 117.452323160064),
        ("e4b", 1.0, 2048, 4, 4.0 * 1.510754746368, 4.0 * 57.064009236480, 234.299055931392),
    ];

    #[test]
    fn agrees_with_maxtext_to_a_billionth() {
        for &(model, batch, seq, accumulation, attention, learnable, total) in ORACLE {
            let arch = if model == "e2b" { e2b() } else { e4b() };
            let f = Flops::training_step(&arch, batch, seq, accumulation);
            for (ours, theirs) in [(f.attention, attention), (f.learnable, learnable), (f.total, total)] {
                let relative = (ours / 1e12 - theirs).abs() / theirs;
                assert!(relative < 1e-9, "{model} {batch}x{seq}: {ours} vs {theirs} TFLOP ({relative:e})");
            }
            assert_eq!(f.tokens, (batch * seq as f64) as u64 * accumulation as u64);
            let layers: f64 = f.layers.iter().map(|l| l.attention).sum();
            assert!((layers - f.attention).abs() <= 1e-6 * f.attention);
        }
    }
}
