//! What a compiled program does on each device, counted: floating-point operations, memory traffic, collectives.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::hlo::{Computation, Instruction, Module, Type};

/// A kind of collective operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CollectiveKind {
    /// Every device gets the parts of all.
    AllGather,
    /// Every device gets the sum.
    AllReduce,
    /// Every device gets its part of the sum.
    ReduceScatter,
    /// Every device sends a part to each.
    AllToAll,
    /// Devices send to one other each.
    Permute,
    /// One device sends to all.
    Broadcast,
}

impl CollectiveKind {
    /// XLA's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CollectiveKind::AllGather => "all-gather",
            CollectiveKind::AllReduce => "all-reduce",
            CollectiveKind::ReduceScatter => "reduce-scatter",
            CollectiveKind::AllToAll => "all-to-all",
            CollectiveKind::Permute => "collective-permute",
            CollectiveKind::Broadcast => "collective-broadcast",
        }
    }

    fn of(opcode: &str) -> Option<Self> {
        Some(match opcode.strip_suffix("-start").unwrap_or(opcode) {
            "all-gather" => CollectiveKind::AllGather,
            "all-reduce" => CollectiveKind::AllReduce,
            "reduce-scatter" => CollectiveKind::ReduceScatter,
            "all-to-all" | "ragged-all-to-all" => CollectiveKind::AllToAll,
            "collective-permute" => CollectiveKind::Permute,
            "collective-broadcast" => CollectiveKind::Broadcast,
            _ => return None,
        })
    }
}

impl fmt::Display for CollectiveKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// All collectives of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CollectiveTotal {
    /// How often one runs, loops counted as often as they repeat.
    pub runs: f64,
    /// Bytes of the whole values (the gathered one, the summed one, ...), on each device, over all runs.
    pub bytes: f64,
    /// Bytes that each device sends over its links when the kind is done around a ring.
    pub sent: f64,
}

/// Figures of an optimised program, for one device and one run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HloStats {
    /// Operations of matrix products and convolutions; a multiply-add counts as two.
    pub flops: f64,
    /// Bytes read and written by instructions, fusions as one: what memory must deliver where caches help nothing.
    pub bytes: f64,
    /// Collectives.
    pub collectives: BTreeMap<CollectiveKind, CollectiveTotal>,
    /// Loops that do not tell how often they repeat; their bodies are counted once.
    pub unknown_loops: usize,
    /// Instructions of all computations.
    pub instructions: usize,
}

impl HloStats {
    /// Reads the figures of a serialised `xla.HloModuleProtoWithConfig`: [`crate::Executable::optimized_program`],
    /// [`crate::AheadOfTime::optimized_program`].
    ///
    /// # Errors
    /// When the bytes are no such program.
    pub fn read(program: &[u8]) -> Result<HloStats, String> {
        let module = Module::read(program).map_err(|_| "the optimised program is not a valid message".to_owned())?;
        let mut counter = Counter { module: &module, done: HashMap::new(), open: Vec::new() };
        let mut stats = counter.computation(module.entry)?;
        stats.instructions = module.computations.values().map(|c| c.instructions.len()).sum();
        Ok(stats)
    }

    /// Bytes that each device sends in all collectives.
    #[must_use]
    pub fn sent(&self) -> f64 {
        self.collectives.values().fold(0.0, |sum, c| sum + c.sent)
    }

    fn add(&mut self, other: &HloStats, times: f64) {
        self.flops += other.flops * times;
        self.bytes += other.bytes * times;
        self.unknown_loops += other.unknown_loops;
        for (kind, c) in &other.collectives {
            let total = self.collectives.entry(*kind).or_default();
            total.runs += c.runs * times;
            total.bytes += c.bytes * times;
            total.sent += c.sent * times;
        }
    }
}

struct Counter<'m, 'a> {
    module: &'m Module<'a>,
    done: HashMap<i64, HloStats>,
    /// Computations being counted: one that calls itself would never end.
    open: Vec<i64>,
}

impl<'m, 'a> Counter<'m, 'a> {
    fn get(&self, id: i64) -> Result<&'m Computation<'a>, String> {
        self.module.computations.get(&id).ok_or_else(|| format!("the optimised program lacks its computation {id}"))
    }

    fn computation(&mut self, id: i64) -> Result<HloStats, String> {
        if let Some(done) = self.done.get(&id) {
            return Ok(done.clone());
        }
        // Deeper nesting than this is no program of a compiler.
        if self.open.contains(&id) || self.open.len() > 256 {
            return Err("the optimised program calls itself".to_owned());
        }
        self.open.push(id);
        let c = self.get(id)?;
        let mut stats = HloStats::default();
        for i in &c.instructions {
            self.instruction(c, i, &mut stats)?;
        }
        self.open.pop();
        self.done.insert(id, stats.clone());
        Ok(stats)
    }

    fn instruction(&mut self, c: &Computation<'a>, i: &Instruction<'a>, stats: &mut HloStats) -> Result<(), String> {
        if let Some(kind) = CollectiveKind::of(i.opcode) {
            collective(self.module, c, i, kind, stats);
            stats.bytes += traffic(c, i);
            return Ok(());
        }
        match i.opcode {
            "while" => {
                // Its body and its condition, in this order.
                let times = trip_count(self.module, i);
                if times.is_none() {
                    stats.unknown_loops += 1;
                }
                for &called in &i.called {
                    let inner = self.computation(called)?;
                    stats.add(&inner, times.unwrap_or(1.0));
                }
            }
            "fusion" => {
                let scatter = i.name.contains("all-reduce-scatter");
                for &called in &i.called {
                    let inner = self.computation(called)?;
                    let before = stats.collectives.clone();
                    // Inside a fusion nothing goes through memory.
                    stats.add(&HloStats { bytes: 0.0, ..inner }, 1.0);
                    if scatter {
                        stats.collectives = before;
                    }
                }
                if scatter {
                    self.scatter_fusion(i, stats)?;
                }
                stats.bytes += self.fusion_traffic(c, i)?;
            }
            "call" | "conditional" | "async-start" => {
                for &called in &i.called {
                    let inner = self.computation(called)?;
                    stats.add(&inner, 1.0);
                }
            }
            "dot" => {
                let lhs = i.operands.first().and_then(|&id| c.get(id));
                let inner: f64 = i
                    .contracting
                    .iter()
                    .filter_map(|&d| lhs?.ty.dims().get(usize::try_from(d).ok()?))
                    .map(|&d| d as f64)
                    .product();
                stats.flops += 2.0 * i.ty.elements() * inner;
                stats.bytes += traffic(c, i);
            }
            "convolution" => {
                stats.flops += convolution(c, i);
                stats.bytes += traffic(c, i);
            }
            "custom-call" => {
                if ["gemm", "matmul"].iter().any(|w| i.target.contains(w)) {
                    stats.flops += product(c, i);
                }
                stats.bytes += traffic(c, i);
            }
            _ => stats.bytes += traffic(c, i),
        }
        Ok(())
    }

    /// TPUs do a reduce-scatter as one fusion of an all-reduce and a slice.
    fn scatter_fusion(&self, i: &Instruction<'a>, stats: &mut HloStats) -> Result<(), String> {
        for &called in &i.called {
            let inner = self.get(called)?;
            for reduce in inner.instructions.iter().filter(|i| i.opcode == "all-reduce") {
                collective(self.module, inner, reduce, CollectiveKind::ReduceScatter, stats);
            }
        }
        Ok(())
    }

    /// Bytes a fusion reads and writes. Of an operand of which it only takes a slice, the slice; where it writes a slice into
    /// an operand, the slice.
    fn fusion_traffic(&self, c: &Computation<'a>, i: &Instruction<'a>) -> Result<f64, String> {
        let Some(&called) = i.called.first() else { return Ok(traffic(c, i)) };
        let inner = self.get(called)?;
        let mut bytes = 0.0;
        for p in inner.instructions.iter().filter(|p| p.opcode == "parameter") {
            let mut part = 0.0;
            let whole = p.ty.bytes();
            for user in inner.instructions.iter().filter(|u| u.operands.contains(&p.id)) {
                let first = user.operands.first() == Some(&p.id);
                part += match user.opcode {
                    "dynamic-slice" | "slice" | "gather" if first => user.ty.bytes(),
                    "dynamic-update-slice" if first => 0.0,
                    _ => whole,
                };
            }
            bytes += part.min(whole);
        }
        let written = |id: i64| match inner.get(id) {
            Some(r) if r.opcode == "dynamic-update-slice" => operand_bytes(inner, r, 1),
            Some(r) => r.ty.bytes(),
            None => 0.0,
        };
        bytes += match inner.root() {
            Some(r) if r.opcode == "tuple" => r.operands.iter().map(|&id| written(id)).sum(),
            Some(r) => written(r.id),
            None => i.ty.bytes(),
        };
        Ok(bytes)
    }
}

fn operand_bytes(c: &Computation<'_>, i: &Instruction<'_>, n: usize) -> f64 {
    i.operands.get(n).and_then(|&id| c.get(id)).map_or(0.0, |o| o.ty.bytes())
}

fn collective(
    module: &Module<'_>,
    c: &Computation<'_>,
    i: &Instruction<'_>,
    kind: CollectiveKind,
    stats: &mut HloStats,
) {
    let operands: f64 = i.operands.iter().filter_map(|&id| c.get(id)).map(|o| o.ty.bytes()).sum();
    // Without groups it is among all devices.
    let group = i.group.filter(|&n| n > 0).unwrap_or(module.devices) as f64;
    if group <= 1.0 {
        return;
    }
    let others = 1.0 - 1.0 / group;
    let (bytes, sent) = match kind {
        CollectiveKind::AllGather => (operands * group, operands * group * others),
        CollectiveKind::AllReduce => (operands, 2.0 * operands * others),
        CollectiveKind::ReduceScatter | CollectiveKind::AllToAll => (operands, operands * others),
        CollectiveKind::Permute | CollectiveKind::Broadcast => (operands, operands),
    };
    let total = stats.collectives.entry(kind).or_default();
    total.runs += 1.0;
    total.bytes += bytes;
    total.sent += sent;
}

/// Bytes an instruction outside a fusion reads and writes.
fn traffic(c: &Computation<'_>, i: &Instruction<'_>) -> f64 {
    match i.opcode {
        "parameter" | "constant" | "tuple" | "get-tuple-element" | "bitcast" | "after-all" | "partition-id"
        | "replica-id" | "iota" | "opt-barrier" => 0.0,
        o if o.ends_with("-done") => 0.0,
        "dynamic-slice" | "slice" | "gather" => 2.0 * i.ty.bytes(),
        "dynamic-update-slice" => 2.0 * operand_bytes(c, i, 1),
        _ => (0..i.operands.len()).map(|n| operand_bytes(c, i, n)).sum::<f64>() + i.ty.bytes(),
    }
}

/// A library's matrix product: the contracted size follows from the sizes of operands and result.
fn product(c: &Computation<'_>, i: &Instruction<'_>) -> f64 {
    let operand = |n: usize| i.operands.get(n).and_then(|&id| c.get(id)).map(|o| &o.ty);
    // The result may come with a workspace.
    let arrays = i.ty.arrays();
    let (Some(l), Some(r), Some(&o)) = (operand(0), operand(1), arrays.first()) else { return 0.0 };
    let batch: f64 = match [l, r, o].map(|t: &Type| t.dims().len()) {
        [a, b, n] if a == b && b == n && n > 2 => o.dims()[..n - 2].iter().map(|&d| d as f64).product(),
        _ => 1.0,
    };
    let outer = o.elements() * batch;
    if outer <= 0.0 {
        return 0.0;
    }
    2.0 * o.elements() * (l.elements() * r.elements() / outer).sqrt()
}

/// TPUs run matrix products as convolutions, with batch dimensions as windows of which most positions fall on padding: those
/// are not counted.
fn convolution(c: &Computation<'_>, i: &Instruction<'_>) -> f64 {
    let Some(input) = i.operands.first().and_then(|&id| c.get(id)) else { return 0.0 };
    let size = |dims: &[i64], d: i64| usize::try_from(d).ok().and_then(|d| dims.get(d)).copied().unwrap_or(1);
    let (input, output) = (input.ty.dims(), i.ty.dims());
    let d = &i.conv;
    let mut fma = size(input, d.input_batch) as f64 / i.batch_groups as f64;
    fma *= size(input, d.input_feature) as f64 / i.feature_groups as f64;
    fma *= size(output, d.output_feature) as f64;
    for (n, w) in i.window.iter().enumerate() {
        let of = |list: &[i64], dims: &[i64]| list.get(n).map_or(1, |&d| size(dims, d));
        let (from, to) = (of(&d.input_spatial, input), of(&d.output_spatial, output));
        // A dimension far beyond any model's would take forever to walk.
        if w.size > 1 << 24 {
            return 0.0;
        }
        fma *= (0..w.size)
            .map(|k| valid(k * w.dilation - w.padding_low, w.stride, w.base_dilation, from, to))
            .sum::<i64>() as f64;
    }
    2.0 * fma
}

/// How many of `to` output positions, the first at `start` of the padded and dilated input and each `stride` further, lie on
/// one of its `from` values.
fn valid(start: i64, stride: i64, dilation: i64, from: i64, to: i64) -> i64 {
    let last = from.saturating_sub(1).saturating_mul(dilation);
    // Positions in range, whatever lies there.
    let low = (-start).max(0).div_euclid(stride) + i64::from((-start).max(0).rem_euclid(stride) != 0);
    let high = (last - start).div_euclid(stride).min(to - 1);
    if high < low {
        return 0;
    }
    if dilation == 1 {
        return high - low + 1;
    }
    // The pattern of hits repeats after `dilation` positions.
    let hit = |o: i64| (start + o * stride).rem_euclid(dilation) == 0;
    let count = high - low + 1;
    let in_period = (0..dilation.min(count)).filter(|o| hit(low + o)).count() as i64;
    let rest = (0..count % dilation).filter(|o| hit(low + o)).count() as i64;
    if count < dilation { in_period } else { count / dilation * in_period + rest }
}

/// How often a loop repeats: as the compiler noted it, or by what its condition compares with.
fn trip_count(module: &Module<'_>, i: &Instruction<'_>) -> Option<f64> {
    const NOTE: &[u8] = b"known_trip_count";
    if let Some(at) = i.backend_config.windows(NOTE.len()).position(|w| w == NOTE) {
        let digits: String = i.backend_config[at + NOTE.len()..]
            .iter()
            .skip_while(|b| !b.is_ascii_digit())
            .take_while(|b| b.is_ascii_digit())
            .map(|&b| char::from(b))
            .collect();
        if let Ok(n) = digits.parse() {
            return Some(n);
        }
    }
    let condition = module.computations.get(i.called.get(1)?)?;
    let mut compare = condition.root()?;
    let mut within = condition;
    if compare.opcode == "fusion" {
        within = module.computations.get(compare.called.first()?)?;
        compare = within.root()?;
    }
    if compare.opcode != "compare" {
        return None;
    }
    let bound = within.get(*compare.operands.get(1)?)?;
    let bound = match bound.opcode {
        "parameter" => {
            let outer = condition.root()?.operands.get(usize::try_from(bound.parameter).ok()?)?;
            condition.get(*outer)?
        }
        _ => bound,
    };
    bound.constant.filter(|&n| n >= 0).map(|n| n as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Writer;

    /// An instruction of a test program.
    struct Op<'t> {
        id: i64,
        name: &'t str,
        opcode: &'t str,
        dims: &'t [i64],
        operands: &'t [i64],
        called: &'t [i64],
        more: &'t dyn Fn(&mut Writer),
    }

    const NONE: &dyn Fn(&mut Writer) = &|_| {};

    fn op<'t>(id: i64, opcode: &'t str, dims: &'t [i64], operands: &'t [i64]) -> Op<'t> {
        Op { id, name: opcode, opcode, dims, operands, called: &[], more: NONE }
    }

    fn computation(w: &mut Writer, id: i64, root: i64, ops: &[Op<'_>]) {
        w.message(3, |c| {
            for op in ops {
                c.message(2, |i| {
                    i.bytes(1, op.name.as_bytes());
                    i.bytes(2, op.opcode.as_bytes());
                    i.message(3, |s| {
                        s.varint(2, 11);
                        s.packed(3, op.dims.iter().copied());
                    });
                    i.varint(35, op.id);
                    i.packed(36, op.operands.iter().copied());
                    i.packed(38, op.called.iter().copied());
                    (op.more)(i);
                });
            }
            c.varint(5, id);
            c.varint(6, root);
        });
    }

    fn module(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
        let mut w = Writer::default();
        w.message(1, |m| {
            write(m);
            m.varint(6, 1);
        });
        w.message(2, |config| {
            config.varint(4, 1);
            config.varint(5, 8);
        });
        w.into_bytes()
    }

    fn contracting(i: &mut Writer) {
        i.message(30, |d| d.packed(1, [1]));
    }

    #[test]
    fn loops_count_as_often_as_they_repeat() {
        let bytes = module(|m| {
            let dot = Op { more: &contracting, ..op(12, "dot", &[4, 8], &[10, 11]) };
            computation(m, 2, 12, &[op(10, "parameter", &[4, 16], &[]), op(11, "parameter", &[16, 8], &[]), dot]);
            computation(m, 3, 20, &[op(20, "parameter", &[], &[])]);
            let note = |i: &mut Writer| i.bytes(43, br#"{"known_trip_count":{"n":"5"}}"#);
            let known = Op { called: &[2, 3], more: &note, ..op(31, "while", &[4], &[30]) };
            let unknown = Op { called: &[2, 3], ..op(32, "while", &[4], &[30]) };
            computation(m, 1, 32, &[op(30, "parameter", &[4], &[]), known, unknown]);
        });
        let stats = HloStats::read(&bytes).unwrap();
        assert_eq!(stats.flops, 6.0 * 2.0 * 4.0 * 8.0 * 16.0);
        assert_eq!(stats.bytes, 6.0 * 4.0 * (64.0 + 128.0 + 32.0));
        assert_eq!((stats.unknown_loops, stats.instructions), (1, 7));
    }

    #[test]
    fn collectives_are_counted_by_kind() {
        let groups = |i: &mut Writer| {
            for g in [[0, 1], [2, 3]] {
                i.message(49, |w| w.packed(1, g));
            }
        };
        let iota = |i: &mut Writer| {
            i.message(92, |g| {
                g.varint(1, 1);
                g.varint(2, 4);
            });
        };
        // Along the second axis of a mesh of 2 x 4, and all devices.
        let axes = |i: &mut Writer| {
            i.message(93, |l| {
                l.message(1, |mesh| [2, 4].into_iter().for_each(|n| mesh.message(1, |axis| axis.varint(2, n))));
                l.message(2, |axis| axis.varint(1, 1));
            });
        };
        let bytes = module(|m| {
            let gather = Op { more: &groups, ..op(3, "all-gather-start", &[24], &[2]) };
            let reduce = Op { more: &iota, ..op(4, "all-reduce", &[8], &[2]) };
            let scatter = Op { more: &axes, ..op(5, "reduce-scatter", &[2], &[2]) };
            let all = op(7, "collective-permute", &[8], &[2]);
            let inner = Op { more: &iota, ..op(21, "all-reduce", &[8], &[20]) };
            computation(m, 2, 21, &[op(20, "parameter", &[8], &[]), inner]);
            let fused = Op { name: "all-reduce-scatter.1", called: &[2], ..op(6, "fusion", &[2], &[2]) };
            computation(m, 1, 6, &[op(2, "parameter", &[8], &[]), gather, reduce, scatter, fused, all]);
        });
        let stats = HloStats::read(&bytes).unwrap();
        let of = |kind| stats.collectives[&kind];
        let total = |runs, bytes, sent| CollectiveTotal { runs, bytes, sent };
        assert_eq!(of(CollectiveKind::AllGather), total(1.0, 64.0, 32.0));
        assert_eq!(of(CollectiveKind::AllReduce), total(1.0, 32.0, 48.0));
        assert_eq!(of(CollectiveKind::ReduceScatter), total(2.0, 64.0, 48.0));
        assert_eq!(of(CollectiveKind::Permute), total(1.0, 32.0, 32.0));
        assert_eq!(stats.sent(), 160.0);
    }

    #[test]
    fn a_batch_in_a_convolution_counts_once() {
        // Three products [2, 4] x [4, 5]: the batch is a spatial dimension of which each output position meets one input.
        let write = |i: &mut Writer| {
            i.message(15, |w| {
                w.message(1, |d| {
                    d.varint(1, 3);
                    d.varint(2, 2);
                    d.varint(6, 3);
                    d.varint(5, 1);
                });
            });
            i.message(16, |d| {
                d.varint(7, 1);
                d.varint(8, 2);
                d.packed(11, [0]);
                d.varint(9, 1);
                d.varint(10, 2);
                d.packed(12, [0]);
            });
        };
        let bytes = module(|m| {
            let conv = Op { more: &write, ..op(4, "convolution", &[3, 2, 5], &[2, 3]) };
            computation(m, 1, 4, &[op(2, "parameter", &[3, 2, 4], &[]), op(3, "parameter", &[3, 4, 5], &[]), conv]);
        });
        assert_eq!(HloStats::read(&bytes).unwrap().flops, 2.0 * 3.0 * 2.0 * 4.0 * 5.0);
    }

    #[test]
    fn valid_positions_agree_with_a_walk() {
        for (start, stride, dilation, from, to) in
            [(0, 1, 1, 5, 5), (-2, 1, 1, 5, 9), (3, 2, 1, 8, 8), (-3, 2, 3, 4, 9), (0, 3, 2, 6, 6), (1, 1, 4, 3, 20)]
        {
            let walk = (0..to)
                .map(|o| start + o * stride)
                .filter(|p| *p >= 0 && *p <= (from - 1) * dilation && p % dilation == 0)
                .count() as i64;
            assert_eq!(valid(start, stride, dilation, from, to), walk, "{start} {stride} {dilation} {from} {to}");
        }
    }

    #[test]
    fn library_products_and_slices() {
        let bytes = module(|m| {
            let target = |i: &mut Writer| i.bytes(28, b"__cublas$gemm");
            let gemm = Op { more: &target, ..op(4, "custom-call", &[4, 8], &[2, 3]) };
            computation(m, 2, 11, &[op(10, "parameter", &[4, 16], &[]), op(11, "dynamic-slice", &[1, 16], &[10])]);
            let fused = Op { called: &[2], ..op(5, "fusion", &[1, 16], &[2]) };
            computation(m, 1, 4, &[op(2, "parameter", &[4, 16], &[]), op(3, "parameter", &[8, 16], &[]), gemm, fused]);
        });
        let stats = HloStats::read(&bytes).unwrap();
        assert_eq!(stats.flops, 2.0 * 4.0 * 8.0 * 16.0);
        assert_eq!(stats.bytes, 4.0 * (64.0 + 128.0 + 32.0) + 4.0 * 32.0);
    }

    #[test]
    fn foreign_bytes_are_errors() {
        assert!(HloStats::read(b"").is_err());
        assert!(HloStats::read(b"\x0a\x05ab").is_err());
        let own = module(|m| computation(m, 1, 1, &[Op { called: &[1], ..op(1, "call", &[], &[]) }]));
        assert!(HloStats::read(&own).unwrap_err().contains("calls itself"));
    }
}
