//! A decode step as functions of the runtime: between two products there is no more than one call.

use graph::{GraphError, Value};
use tensor::DType;

use super::{Feed, KvSource, Stream};
use crate::attention::KeyValues;
use crate::called::{StepAttention, Then, products_around, step_attention};
use crate::nn::Result;
use crate::params::EMBED_TOKENS;

impl Feed<'_> {
    /// All layers and the head for one token of every sequence: what [`crate::layer::layer`] and the programs for longer chunks say
    /// in single operations.
    pub(super) fn step(&self, session: Value, stream: Stream) -> Result<(Vec<Value>, Option<Value>)> {
        let (g, spec, b) = (self.g, self.arch.spec(), self.options.batch);
        let eps = spec.rms_norm_eps;
        let flat = |x: Value| g.reshape(x, [b, g.dims(x)[1..].iter().product()]);
        let ple = stream.ple.map(flat).transpose()?;
        let mut x = flat(stream.x)?;
        let mut caches = self.cache.clone();
        let mut written = Vec::new();
        for (index, l) in self.arch.layers().iter().enumerate() {
            let _scope = g.scope(&format!("layers.{index}"));
            let w = self.weights(index, b);
            let norm_of = |name: &str| self.plain(w.get(name));
            let products = |x: Value, norm: Option<&str>, names: &[&str], then: Then| {
                let wanted: Vec<(usize, usize)> = names.iter().map(|name| w.called(name)).collect();
                products_around(g, session, x, norm.map(norm_of).transpose()?, eps, &wanted, then)
            };
            let onto = |x, norm, scale| Ok::<_, GraphError>(Then::Onto { x, norm: norm_of(norm)?, scale });
            let (q, k, v) = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight");
            let (donor, names) = match l.kv {
                KvSource::Own if l.k_eq_v => (index, vec![q, k]),
                KvSource::Own => (index, vec![q, k, v]),
                KvSource::Shared { donor } => (donor, vec![q]),
            };
            let raw = products(x, Some("input_layernorm.weight"), &names, Then::Results)?;
            let new = match raw[1..] {
                [] => None,
                [k, ..] => Some((k, raw[raw.len() - 1], norm_of("self_attn.k_norm.weight")?)),
            };
            let angles = stream.angles.get(l.kind);
            let attention = StepAttention {
                queries: (raw[0], norm_of("self_attn.q_norm.weight")?),
                new,
                angles: [angles.cos, angles.sin],
                positions: self.start,
                eps,
            };
            let cache = &caches[&donor];
            let (context, [keys, values]) = step_attention(g, &attention, [cache.keys, cache.values])?;
            if new.is_some() {
                written.extend([keys, values]);
                caches.insert(index, KeyValues { keys, values });
            }
            let then = onto(x, "post_attention_layernorm.weight", None)?;
            x = products(context, None, &["self_attn.o_proj.weight"], then)?[0];

            let names = ["mlp.gate_proj.weight", "mlp.up_proj.weight"];
            let inner = products(x, Some("pre_feedforward_layernorm.weight"), &names, Then::Gated)?[0];
            let scalar = norm_of("layer_scalar")?;
            let then = onto(x, "post_feedforward_layernorm.weight", Some(scalar).filter(|_| ple.is_none()))?;
            x = products(inner, None, &["mlp.down_proj.weight"], then)?[0];

            if let (Some(by), Some(p)) = (ple, self.arch.per_layer_input()) {
                // The gate reads the residual stream un-normed.
                let then = Then::GatedBy { by, column: index * p.width };
                let gate = products(x, None, &["per_layer_input_gate.weight"], then)?[0];
                let then = onto(x, "post_per_layer_input_norm.weight", Some(scalar))?;
                x = products(gate, None, &["per_layer_projection.weight"], then)?[0];
            }
        }
        let table = self.params.called[EMBED_TOKENS];
        let then = spec.final_logit_softcapping.map_or(Then::Results, Then::Capped);
        let norm = self.plain(self.params.values["norm.weight"])?;
        let z = products_around(g, session, x, Some(norm), eps, &[table], then)?[0];
        Ok((written, Some(g.convert(z, DType::F32)?)))
    }

    /// A parameter of norms in a dtype that functions read.
    fn plain(&self, x: Value) -> Result<Value> {
        match self.g.dtype(x) {
            DType::F32 | DType::BF16 => Ok(x),
            _ => self.g.convert(x, DType::F32),
        }
    }
}
