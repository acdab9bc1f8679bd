//! The one table of parameters. Initialisation, sharding, both checkpoint formats, FLOPs and memory plans derive from it.

use tensor::{Axis, Init, ParamSpec, Part, Shape, Transform};

use crate::Arch;
use crate::arch::Layer;

/// Hugging Face name of the token table, without a layout prefix.
pub const EMBED_TOKENS: &str = "embed_tokens.weight";
/// Hugging Face name of the per-layer token table, without a layout prefix.
pub const EMBED_TOKENS_PER_LAYER: &str = "embed_tokens_per_layer.weight";

/// Every parameter of the model: globals first, then layer by layer.
///
/// Initialisers are MaxText's distributions stated in the Hugging Face convention: its token table is N(0, 1) scaled
/// by sqrt(hidden), so the unscaled one has standard deviation hidden^(-1/2).
#[must_use]
pub fn param_table(arch: &Arch) -> Vec<ParamSpec> {
    let (d, v) = (arch.hidden_size(), arch.vocab_size());
    let mut table = vec![ParamSpec {
        name: EMBED_TOKENS.into(),
        shape: [v, d].into(),
        maxtext_name: "token_embedder.embedding".into(),
        maxtext_shape: [v, d].into(),
        axes: vec![Axis::Vocab, Axis::EmbedVocab],
        transform: Transform::Scale((d as f32).sqrt()),
        init: Init::Normal((d as f32).powf(-0.5)),
        part: Part::TokenEmbedding,
        layer: None,
        trainable: true,
    }];
    if let Some(ple) = arch.per_layer_input() {
        let lp = arch.layers().len() * ple.width;
        table.push(ParamSpec {
            name: EMBED_TOKENS_PER_LAYER.into(),
            shape: [ple.vocab_size, lp].into(),
            maxtext_name: "decoder.per_layer_embedder.embed_tokens_per_layer".into(),
            maxtext_shape: [ple.vocab_size, lp].into(),
            axes: vec![Axis::Vocab, Axis::EmbedVocab],
            transform: Transform::Copy,
            init: Init::Normal((ple.width as f32).powf(-0.5)),
            part: Part::PerLayerEmbedding,
            layer: None,
            trainable: true,
        });
        table.push(Dense { out: lp, inp: d, std: Std::Truncated, part: Part::PerLayerProjection, layer: None }.spec(
            "per_layer_model_projection.weight".into(),
            "decoder.per_layer_embedder.per_layer_model_projection.kernel".into(),
            [d, lp].into(),
            vec![Axis::Embed, Axis::Mlp],
        ));
        table.push(norm(
            "per_layer_projection_norm.weight".into(),
            "decoder.per_layer_embedder.per_layer_projection_norm.scale".into(),
            ple.width,
            Part::PerLayerProjection,
            None,
        ));
    }
    table.push(norm("norm.weight".into(), "decoder.decoder_norm.scale".into(), d, Part::Norm, None));
    for (index, layer) in arch.layers().iter().enumerate() {
        push_layer(&mut table, arch, index, layer);
    }
    table
}

fn push_layer(table: &mut Vec<ParamSpec>, arch: &Arch, index: usize, layer: &Layer) {
    let (d, h, e, k, f) = (arch.hidden_size(), arch.num_heads(), layer.head_dim, layer.kv_heads, layer.mlp_width);
    let hf = |s: &str| format!("layers.{index}.{s}");
    let mt = |s: &str| format!("decoder.layers_{index}.{s}");
    let at = Some(index);
    let mut norms = vec![
        ("input_layernorm.weight", "pre_self_attention_norm.scale"),
        ("post_attention_layernorm.weight", "post_self_attention_norm.scale"),
        ("pre_feedforward_layernorm.weight", "pre_ffw_norm.scale"),
        ("post_feedforward_layernorm.weight", "post_ffw_norm.scale"),
    ];
    if arch.per_layer_input().is_some() {
        norms.push(("post_per_layer_input_norm.weight", "post_per_layer_input_norm.scale"));
    }
    for (name, maxtext) in norms {
        table.push(norm(hf(name), mt(maxtext), d, Part::Norm, at));
    }
    let head_norm = |name: &str, maxtext: &str| norm(hf(name), mt(maxtext), e, Part::Attention, at);
    let attention = |out, inp, std| Dense { out, inp, std, part: Part::Attention, layer: at };
    // MaxText divides the query kernel by sqrt(head size) once more; the q norm makes that invisible.
    table.push(attention(h * e, d, Std::NormalOver((e as f32).sqrt())).spec(
        hf("self_attn.q_proj.weight"),
        mt("self_attention.query.kernel"),
        [d, h, e].into(),
        vec![Axis::Embed, Axis::QHeads, Axis::Kv],
    ));
    table.push(head_norm("self_attn.q_norm.weight", "self_attention.query_norm.scale"));
    if layer.owns_kv() {
        let axes = vec![Axis::Embed, Axis::KvHeads, Axis::KvHeadDim];
        let key_value = |name, maxtext| {
            attention(k * e, d, Std::NormalOver(1.0)).spec(hf(name), mt(maxtext), [d, k, e].into(), axes.clone())
        };
        table.push(key_value("self_attn.k_proj.weight", "self_attention.key.kernel"));
        table.push(head_norm("self_attn.k_norm.weight", "self_attention.key_norm.scale"));
        if !layer.k_eq_v {
            table.push(key_value("self_attn.v_proj.weight", "self_attention.value.kernel"));
        }
    }
    table.push(attention(d, h * e, Std::NormalOver(1.0)).spec(
        hf("self_attn.o_proj.weight"),
        mt("self_attention.out.kernel"),
        [h, e, d].into(),
        vec![Axis::Heads, Axis::Kv, Axis::Embed],
    ));
    let mlp = |out, inp, name, maxtext, axes| {
        Dense { out, inp, std: Std::Truncated, part: Part::Mlp, layer: at }.spec(
            hf(name),
            mt(maxtext),
            [inp, out].into(),
            axes,
        )
    };
    table.push(mlp(f, d, "mlp.gate_proj.weight", "mlp.wi_0.kernel", vec![Axis::Embed, Axis::Mlp]));
    table.push(mlp(f, d, "mlp.up_proj.weight", "mlp.wi_1.kernel", vec![Axis::Embed, Axis::Mlp]));
    table.push(mlp(d, f, "mlp.down_proj.weight", "mlp.wo.kernel", vec![Axis::Mlp, Axis::Embed]));
    if let Some(ple) = arch.per_layer_input() {
        let gate = |out, inp, name, maxtext, axes| {
            Dense { out, inp, std: Std::Truncated, part: Part::PerLayerGate, layer: at }.spec(
                hf(name),
                mt(maxtext),
                [inp, out].into(),
                axes,
            )
        };
        let p = ple.width;
        table.push(gate(
            p,
            d,
            "per_layer_input_gate.weight",
            "per_layer_input_gate.kernel",
            vec![Axis::Embed, Axis::Mlp],
        ));
        table.push(gate(
            d,
            p,
            "per_layer_projection.weight",
            "per_layer_projection.kernel",
            vec![Axis::Mlp, Axis::Embed],
        ));
    }
    table.push(ParamSpec {
        name: hf("layer_scalar"),
        shape: [1].into(),
        maxtext_name: mt("layer_scalar"),
        maxtext_shape: [1].into(),
        axes: vec![Axis::Replicated],
        transform: Transform::Copy,
        init: Init::Constant(1.0),
        part: Part::Norm,
        layer: at,
        trainable: false,
    });
}

fn norm(name: String, maxtext_name: String, width: usize, part: Part, layer: Option<usize>) -> ParamSpec {
    ParamSpec {
        name,
        shape: [width].into(),
        maxtext_name,
        maxtext_shape: [width].into(),
        axes: vec![Axis::Norm],
        transform: Transform::Copy,
        init: Init::Constant(1.0),
        part,
        layer,
        trainable: true,
    }
}

/// Variance scaling with fan in: standard deviation fan_in^(-1/2), over an extra divisor for plain normals.
enum Std {
    Truncated,
    NormalOver(f32),
}

/// A matrix held as `[out, inp]` by Hugging Face.
struct Dense {
    out: usize,
    inp: usize,
    std: Std,
    part: Part,
    layer: Option<usize>,
}

impl Dense {
    fn spec(self, name: String, maxtext_name: String, maxtext_shape: Shape, axes: Vec<Axis>) -> ParamSpec {
        let std = (self.inp as f32).powf(-0.5);
        ParamSpec {
            name,
            shape: [self.out, self.inp].into(),
            maxtext_name,
            maxtext_shape,
            axes,
            transform: Transform::Transpose,
            init: match self.std {
                Std::Truncated => Init::TruncatedNormal(std),
                Std::NormalOver(divisor) => Init::Normal(std / divisor),
            },
            part: self.part,
            layer: self.layer,
            trainable: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::arch::tests::{e2b, e4b};

    fn count(table: &[ParamSpec], part: Part) -> usize {
        table.iter().filter(|p| p.part == part).map(|p| p.shape.elements()).sum()
    }

    #[test]
    fn tensor_and_parameter_counts_are_the_published_ones() {
        let t = param_table(&e2b());
        assert_eq!(t.len(), 540);
        assert_eq!(t.iter().map(|p| p.shape.elements()).sum::<usize>(), 4_628_569_379);
        assert_eq!(count(&t, Part::TokenEmbedding), 402_653_184);
        assert_eq!(count(&t, Part::PerLayerEmbedding), 2_348_810_240);
        let t = param_table(&e4b());
        assert_eq!(t.len(), 665);
        assert_eq!(t.iter().map(|p| p.shape.elements()).sum::<usize>(), 7_463_013_418);
        assert_eq!(count(&t, Part::PerLayerEmbedding), 2_818_572_288);
    }

    #[test]
    fn layer_sizes_are_the_published_ones() {
        let layer =
            |t: &[ParamSpec], i| t.iter().filter(|p| p.layer == Some(i)).map(|p| p.shape.elements()).sum::<usize>();
        let t = param_table(&e2b());
        assert_eq!([0, 4, 15, 19].map(|i| layer(&t, i)), [36_184_065, 43_262_465, 63_708_929, 70_000_641]);
        let t = param_table(&e4b());
        assert_eq!([0, 5, 24, 29].map(|i| layer(&t, i)), [93_074_433, 106_182_145, 90_452_737, 100_938_753]);
    }

    #[test]
    fn both_spellings_hold_the_same_elements_under_unique_names() {
        for t in [param_table(&e2b()), param_table(&e4b())] {
            let mut hf = HashSet::new();
            let mut maxtext = HashSet::new();
            for p in &t {
                assert_eq!(p.shape.elements(), p.maxtext_shape.elements(), "{}", p.name);
                assert_eq!(p.axes.len(), p.maxtext_shape.rank(), "{}", p.name);
                assert!(hf.insert(&p.name) && maxtext.insert(&p.maxtext_name), "{}", p.name);
            }
        }
    }

    #[test]
    fn shared_layers_have_no_keys_or_values() {
        let t = param_table(&e2b());
        assert!(t.iter().any(|p| p.name == "layers.14.self_attn.v_proj.weight"));
        assert!(!t.iter().any(|p| p.name == "layers.15.self_attn.v_proj.weight"));
        assert!(t.iter().any(|p| p.name == "layers.15.self_attn.q_norm.weight"));
    }
}
