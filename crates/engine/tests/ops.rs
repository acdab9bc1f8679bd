//! Every op of the graph: what the compiled program computes is what the reference interpreter computes.
//!
//! Programs gather many ops of one dtype, so that there are few compilations; each output is compared by name. Integers and
//! bools must agree exactly. A float may differ by [`tolerance`] of the larger of its magnitude and 1 (the compiler's
//! elementary functions are a few units off in the last place, and its sums run in another order).

// The helpers of a test may unwrap as the test itself does.
#![allow(clippy::unwrap_used)]

use std::sync::OnceLock;

use graph::{
    BinaryOp, Compare, DotDims, Graph, GraphError, InputOptions, Op, OutputOptions, Program, Sharding, UnaryOp, Value,
    finite_min, interp,
};
use pjrt::{Buffer, Client, ClientOptions, CompileOptions, Executable, Plugin, plugins::LocateOptions};
use tensor::{DType, HostArray, Shape};

type Result<T = ()> = std::result::Result<T, GraphError>;

const FLOATS: [DType; 4] = [DType::F32, DType::BF16, DType::F64, DType::F16];
const INTEGERS: [DType; 8] =
    [DType::I8, DType::I16, DType::I32, DType::I64, DType::U8, DType::U16, DType::U32, DType::U64];

/// Allowed difference, relative to the larger of 1 and the expected magnitude.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        // A compiled result may round the other way when the exact value is near a tie: one unit in the last place.
        DType::BF16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
        DType::F32 => 2e-6,
        DType::F64 => 1e-13,
        _ => 0.0,
    }
}

/// Four virtual devices, shared by all tests of this binary.
fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let path = Plugin::locate("cpu", &LocateOptions::default()).unwrap();
        Client::new(&Plugin::load(path).unwrap(), &ClientOptions::cpu(4)).unwrap()
    })
}

/// A small counter-based generator: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// What the elements of an input are drawn from.
#[derive(Clone)]
enum Draw {
    /// Between the two; whole numbers for integers.
    Range(f64, f64),
    /// One of these.
    OneOf(Vec<f64>),
}

impl Draw {
    fn array(&self, r: &mut Random, dtype: DType, shape: &Shape) -> HostArray {
        let v: Vec<f64> = (0..shape.elements())
            .map(|_| match self {
                Draw::Range(lo, hi) if dtype.is_float() => lo + (hi - lo) * r.unit(),
                Draw::Range(lo, hi) => (lo + (hi + 1.0 - lo) * r.unit()).floor(),
                Draw::OneOf(v) => v[(r.next() % v.len() as u64) as usize],
            })
            .collect();
        HostArray::from_f64(dtype, shape.clone(), &v).unwrap()
    }
}

/// A program under test with what its inputs are drawn from.
struct Suite {
    g: Graph,
    draws: Vec<Draw>,
}

impl Suite {
    fn new(name: &str) -> Self {
        Suite { g: Graph::new(name), draws: Vec::new() }
    }

    fn input(&mut self, dtype: DType, shape: &[usize], draw: Draw) -> Value {
        self.input_with(dtype, shape, draw, InputOptions::default())
    }

    fn input_with(&mut self, dtype: DType, shape: &[usize], draw: Draw, options: InputOptions) -> Value {
        let name = format!("in{}", self.draws.len());
        self.draws.push(draw);
        self.g.input_with(&name, dtype, shape, options).unwrap()
    }

    fn range(&mut self, dtype: DType, shape: &[usize], lo: f64, hi: f64) -> Value {
        self.input(dtype, shape, Draw::Range(lo, hi))
    }

    fn output(&self, name: &str, v: Result<Value>) {
        let name = name.to_owned();
        self.g.output(&name, v.unwrap()).unwrap();
    }

    /// Runs the program on several draws and compares every output.
    fn check(self) {
        self.check_on(1);
    }

    /// As [`Suite::check`], partitioned over some devices.
    fn check_on(self, devices: usize) {
        let program = self.g.finish().unwrap();
        let options = CompileOptions::default()
            .with("xla_allow_excess_precision", false)
            // Otherwise the CPU compiler lets the other operand of a maximum or minimum win over a NaN.
            .with("xla_cpu_enable_fast_min_max", false)
            .partitioned(devices);
        let executable = client().compile(&program.stablehlo(), &options).unwrap();
        for seed in 0..3 {
            let mut r = Random(seed);
            let inputs: Vec<HostArray> = program
                .inputs
                .iter()
                .zip(&self.draws)
                .map(|(spec, draw)| draw.array(&mut r, spec.dtype, &spec.shape))
                .collect();
            compare(&program, &executable, &inputs, devices);
        }
    }
}

fn compare(program: &Program, executable: &Executable, inputs: &[HostArray], devices: usize) {
    let want = interp::run(program, inputs).unwrap();
    let got = run_compiled(program, executable, inputs, devices);
    assert_eq!(want.len(), got.len());
    for ((spec, want), got) in program.outputs.iter().zip(&want).zip(&got) {
        let at = format!("{}: output {:?}", program.name(), spec.name);
        assert_eq!((got.dtype(), got.shape()), (want.dtype(), want.shape()), "{at}");
        assert_close(&at, want, got);
    }
}

fn assert_close(at: &str, want: &HostArray, got: &HostArray) {
    let dtype = want.dtype();
    for (i, (&w, &g)) in want.to_f64().iter().zip(&got.to_f64()).enumerate() {
        let close = if w.is_finite() && g.is_finite() {
            (w - g).abs() <= tolerance(dtype) * w.abs().max(1.0)
        } else {
            w == g || (w.is_nan() && g.is_nan())
        };
        assert!(close, "{at}, element {i} of {dtype}{}: interpreter {w:e}, compiled {g:e}", want.shape());
    }
}

/// Runs a program; inputs and outputs are whole arrays, cut up and put together by their shardings.
fn run_compiled(program: &Program, executable: &Executable, inputs: &[HostArray], devices: usize) -> Vec<HostArray> {
    let shard = |a: &HostArray, s: Option<&Sharding>, device: usize| match (program.mesh(), s) {
        (Some(mesh), Some(s)) => {
            let (starts, shape) = part(program, s, a.shape(), device);
            assert_eq!(shape, s.shard_shape(mesh, a.shape()).unwrap());
            cut(a, &starts, &shape)
        }
        _ => a.clone(),
    };
    let arguments: Vec<Vec<Buffer>> = (0..devices)
        .map(|d| {
            let parts = inputs.iter().zip(&program.inputs).map(|(a, spec)| shard(a, spec.sharding.as_ref(), d));
            parts.map(|a| client().buffer_from_host(&a, d).unwrap()).collect()
        })
        .collect();
    let lists: Vec<Vec<&Buffer>> = arguments.iter().map(|l| l.iter().collect()).collect();
    let results = executable.execute_sharded(&lists).unwrap();
    for (spec, buffer) in program.inputs.iter().zip(&arguments[0]) {
        assert_eq!(buffer.is_deleted(), spec.donated, "{}: {} after the run", program.name(), spec.name);
    }
    let outputs = program.outputs.iter().enumerate();
    outputs
        .map(|(o, spec)| {
            let mut whole = HostArray::zeros(spec.dtype, spec.shape.clone()).unwrap();
            for (d, list) in results.iter().enumerate() {
                let a = list[o].to_host().unwrap();
                match spec.sharding.as_ref().filter(|_| devices > 1) {
                    Some(s) => {
                        let (starts, shape) = part(program, s, &spec.shape, d);
                        assert_eq!(a.shape(), &shape, "{}: output {:?} on device {d}", program.name(), spec.name);
                        paste(&mut whole, &a, &starts);
                    }
                    None => whole = a,
                }
            }
            whole
        })
        .collect()
}

/// Where a device's part of a value begins, and its shape. Devices are numbered row-major over the mesh.
fn part(program: &Program, s: &Sharding, shape: &Shape, device: usize) -> (Vec<usize>, Shape) {
    let mesh = program.mesh().unwrap();
    let mut rest = device;
    let mut coordinate: Vec<(&str, usize)> = Vec::new();
    for (name, size) in mesh.axes().iter().rev() {
        coordinate.push((name, rest % size));
        rest /= size;
    }
    let local = s.shard_shape(mesh, shape).unwrap();
    let starts = s
        .dims()
        .iter()
        .zip(local.iter())
        .map(|(axes, n)| {
            let mut index = 0;
            for axis in axes {
                let at = coordinate.iter().find(|(a, _)| a == axis).unwrap().1;
                index = index * mesh.size(axis).unwrap() + at;
            }
            index * n
        })
        .collect();
    (starts, local)
}

/// Byte offsets in the whole array of the elements of a part, row-major.
fn offsets(whole: &Shape, starts: &[usize], part: &Shape, size: usize) -> Vec<usize> {
    let mut out = vec![0];
    for (d, stride) in whole.strides().into_iter().enumerate() {
        out = out.iter().flat_map(|&o| (0..part[d]).map(move |i| o + (starts[d] + i) * stride * size)).collect();
    }
    out
}

fn cut(a: &HostArray, starts: &[usize], shape: &Shape) -> HostArray {
    let n = a.dtype().size();
    let bytes: Vec<u8> =
        offsets(a.shape(), starts, shape, n).into_iter().flat_map(|o| a.bytes()[o..o + n].to_vec()).collect();
    HostArray::from_bytes(a.dtype(), shape.clone(), &bytes).unwrap()
}

fn paste(whole: &mut HostArray, part: &HostArray, starts: &[usize]) {
    let n = whole.dtype().size();
    let places = offsets(whole.shape(), starts, part.shape(), n);
    for (o, e) in places.into_iter().zip(part.bytes().chunks_exact(n)) {
        whole.bytes_mut()[o..o + n].copy_from_slice(e);
    }
}

#[test]
fn elementwise_on_floats() {
    for d in FLOATS {
        let mut t = Suite::new(&format!("float_{d}"));
        let (x, y) = (t.range(d, &[3, 17], -4.0, 4.0), t.range(d, &[3, 17], -4.0, 4.0));
        let positive = t.range(d, &[3, 17], 0.01, 4.0);
        let p = t.range(DType::Bool, &[3, 17], 0.0, 1.0);
        let g = &t.g;
        for &u in UnaryOp::ALL {
            let x = match u {
                UnaryOp::Log | UnaryOp::Log1p | UnaryOp::Sqrt | UnaryOp::Rsqrt => positive,
                UnaryOp::Not => continue,
                _ => x,
            };
            t.output(u.name(), g.apply(Op::Unary(u), &[x]).map(|v| v[0]));
        }
        for &b in BinaryOp::ALL {
            let (x, y) = match b {
                BinaryOp::Pow => (positive, y),
                BinaryOp::Div | BinaryOp::Rem => (x, positive),
                BinaryOp::And | BinaryOp::Or | BinaryOp::Xor => continue,
                _ => (x, y),
            };
            t.output(b.name(), g.apply(Op::Binary(b), &[x, y]).map(|v| v[0]));
        }
        for &c in Compare::ALL {
            t.output(c.name(), g.compare(c, g.floor(x).unwrap(), g.floor(y).unwrap()));
        }
        let s = g.scalar(d, 0.75).unwrap();
        t.output("select", g.select(p, x, y));
        t.output("clamp", g.clamp(s, x, positive));
        t.output("clamp_scalar", g.clamp(g.neg(s).unwrap(), x, s));
        t.output("add_scalar", g.add_scalar(x, 0.3));
        t.output("mul_scalar", g.mul_scalar(x, 0.3));
        t.output("reduce_precision", g.reduce_precision(x, 5, 3));
        for to in DType::ALL {
            // Values that the target holds: conversions of others are a matter of the compiler's taste.
            let x = if to.is_signed() { x } else { positive };
            t.output(&format!("to_{to}"), g.convert(x, to));
        }
        t.check();
    }
}

#[test]
fn special_values() {
    let special = vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0, 0.5, -2.5];
    for d in FLOATS {
        let mut t = Suite::new(&format!("special_{d}"));
        let (x, y) =
            (t.input(d, &[200], Draw::OneOf(special.clone())), t.input(d, &[200], Draw::OneOf(special.clone())));
        let g = &t.g;
        for &u in UnaryOp::ALL {
            if u != UnaryOp::Not {
                t.output(u.name(), g.apply(Op::Unary(u), &[x]).map(|v| v[0]));
            }
        }
        for b in [BinaryOp::Add, BinaryOp::Mul, BinaryOp::Div, BinaryOp::Max, BinaryOp::Min] {
            t.output(b.name(), g.apply(Op::Binary(b), &[x, y]).map(|v| v[0]));
        }
        for &c in Compare::ALL {
            t.output(c.name(), g.compare(c, x, y));
        }
        t.output("to_bool", g.convert(x, DType::Bool));
        t.output("clamp", g.clamp(g.scalar(d, -1.0).unwrap(), x, g.scalar(d, 1.0).unwrap()));
        t.output("sum", g.reduce_sum(x, &[0]));
        t.output("max", g.reduce_max(x, &[0]));
        t.output("min", g.reduce_min(x, &[0]));
        t.check();
    }
}

#[test]
fn elementwise_on_integers() {
    for d in INTEGERS {
        let mut t = Suite::new(&format!("integer_{d}"));
        // Sums and products of the smaller dtypes wrap; the wider ones stay where the interpreter is exact.
        let hi = if d.size() <= 4 { 2f64.powi(d.size() as i32 * 8 - 1) - 1.0 } else { 1e6 };
        let lo = if d.is_signed() { -hi } else { 0.0 };
        let (x, y) = (t.range(d, &[2, 40], lo, hi), t.range(d, &[2, 40], lo, hi));
        let (a, b) =
            (t.range(d, &[2, 40], if d.is_signed() { -9.0 } else { 0.0 }, 9.0), t.range(d, &[2, 40], 0.0, 3.0));
        let p = t.range(DType::Bool, &[], 0.0, 1.0);
        let g = &t.g;
        for &u in UnaryOp::ALL {
            // Exact only where 64-bit values stay small.
            if !d.is_signed() && d.size() == 8 && matches!(u, UnaryOp::Neg | UnaryOp::Not) {
                continue;
            }
            if let Ok(v) = g.apply(Op::Unary(u), &[x]) {
                t.output(u.name(), Ok(v[0]));
            }
        }
        for &op in BinaryOp::ALL {
            if op == BinaryOp::Sub && !d.is_signed() && d.size() == 8 {
                continue;
            }
            if let Ok(v) = g.apply(Op::Binary(op), &[x, y]) {
                t.output(op.name(), Ok(v[0]));
            }
            // Small numbers: divisions by zero, equal operands.
            if matches!(op, BinaryOp::Div | BinaryOp::Rem | BinaryOp::Max) && d != DType::U64 {
                t.output(&format!("small_{}", op.name()), g.apply(Op::Binary(op), &[a, b]).map(|v| v[0]));
            }
        }
        for &c in Compare::ALL {
            t.output(c.name(), g.compare(c, a, b));
        }
        t.output("select", g.select(p, x, y));
        t.output("clamp", g.clamp(g.scalar(d, 2.0).unwrap(), x, y));
        for to in DType::ALL {
            // Exact only below 2^53: a negative number is far above it as an unsigned 64-bit one.
            if to != DType::U64 || !d.is_signed() {
                t.output(&format!("to_{to}"), g.convert(x, to));
            }
        }
        t.check();
    }
}

#[test]
fn elementwise_on_bools() {
    let mut t = Suite::new("bools");
    let [x, y, z] = [(); 3].map(|()| t.range(DType::Bool, &[5, 6], 0.0, 1.0));
    let g = &t.g;
    t.output("not", g.not(x));
    t.output("and", g.and(x, y));
    t.output("or", g.or(x, y));
    t.output("xor", g.xor(x, y));
    t.output("eq", g.compare(Compare::Eq, x, y));
    t.output("ne", g.compare(Compare::Ne, x, y));
    t.output("select", g.select(x, y, z));
    t.output("reduce_and", g.reduce_and(x, &[1]));
    t.output("reduce_or", g.reduce_or_keep(x, &[0, 1]));
    for to in DType::ALL {
        t.output(&format!("to_{to}"), g.convert(x, to));
    }
    t.check();
}

#[test]
fn constants_and_counts() {
    for d in DType::ALL {
        let mut t = Suite::new(&format!("constants_{d}"));
        let x = t.range(d, &[2, 3], 0.0, 1.0);
        let g = &t.g;
        let mut r = Random(7);
        let draw = if d.is_float() { Draw::Range(-3.0, 3.0) } else { Draw::Range(0.0, 1.0) };
        t.output("array", g.constant(draw.array(&mut r, d, &Shape::from([2, 3, 4]))));
        t.output("empty", g.constant(HostArray::zeros(d, [0, 3]).unwrap()));
        t.output("scalar", g.scalar(d, 1.0));
        t.output("splat", g.splat(d, [4, 1], 1.0));
        t.output("like", g.full_like(x, 0.0));
        t.output("lowest", g.scalar(d, finite_min(d)));
        if d != DType::Bool {
            t.output("iota0", g.iota(d, [3, 4], 0));
            t.output("iota1", g.iota(d, [3, 4], 1));
        }
        if d.is_float() {
            t.output("tenth", g.scalar(d, 0.1));
            t.output("infinite", g.scalar(d, f64::NEG_INFINITY));
            t.output("nan", g.scalar(d, f64::NAN));
        }
        t.check();
    }
}

#[test]
fn movement() {
    for d in DType::ALL {
        let mut t = Suite::new(&format!("movement_{d}"));
        let lo = if d.is_signed() { -9.0 } else { 0.0 };
        let hi = if d == DType::Bool { 1.0 } else { 9.0 };
        let (x, y) = (t.range(d, &[2, 3, 4], lo, hi), t.range(d, &[2, 1, 4], lo, hi));
        let s = t.range(d, &[], lo, hi);
        let g = &t.g;
        t.output("broadcast", g.broadcast_in_dim(y, [2, 5, 3, 4], &[0, 2, 3]));
        t.output("broadcast_scalar", g.broadcast_to(s, [3, 2]));
        t.output("broadcast_to", g.broadcast_to(y, [7, 2, 3, 4]));
        t.output("reshape", g.reshape(x, [4, 6]));
        t.output("expand_dim", g.expand_dim(x, 3));
        t.output("transpose", g.transpose(x, &[2, 0, 1]));
        t.output("slice", g.slice(x, &[0, 1, 0], &[2, 3, 4], &[1, 1, 3]));
        t.output("slice_empty", g.slice_dim(x, 1, 2, 2));
        t.output("slice_dim", g.slice_dim(x, 2, 1, 3));
        t.output("pad", g.pad(x, s, &[1, 0, -1], &[0, 2, 1], &[0, 1, 2]));
        t.output("crop", g.pad(x, s, &[0, -1, -2], &[-1, 0, -1], &[0, 0, 0]));
        t.output("concatenate", g.concatenate(&[x, y, x], 1));
        t.output("reverse", g.reverse(x, &[0, 2]));
        t.output("barrier", g.optimization_barrier(&[x, s]).map(|v| v[0]));
        t.check();
    }
}

#[test]
fn positions_at_run_time() {
    for d in [DType::F32, DType::BF16, DType::I32, DType::Bool, DType::F64] {
        for index in [DType::I32, DType::I64, DType::U32] {
            let mut t = Suite::new(&format!("positions_{d}_{index}"));
            let lo = if index.is_signed() { -2.0 } else { 0.0 };
            let hi = if d == DType::Bool { 1.0 } else { 9.0 };
            let x = t.range(d, &[5, 6], 0.0, hi);
            let update = t.range(d, &[2, 3], 0.0, hi);
            let (i, j) = (t.range(index, &[], lo, 7.0), t.range(index, &[], lo, 7.0));
            // Some ids are out of range, some repeat.
            let ids = t.range(index, &[2, 4], lo, 7.0);
            let rows = t.range(d, &[2, 4, 6], 0.0, hi);
            let column = t.range(d, &[5], 0.0, hi);
            let elements = t.range(d, &[2, 4], 0.0, hi);
            let one = t.range(index, &[], 0.0, 4.0);
            let row = t.range(d, &[6], 0.0, hi);
            let g = &t.g;
            t.output("dynamic_slice", g.dynamic_slice(x, &[i, j], &[2, 3]));
            t.output("dynamic_update_slice", g.dynamic_update_slice(x, update, &[i, j]));
            t.output("take", g.take(x, ids));
            t.output("take_elements", g.take(column, ids));
            t.output("take_one", g.take(x, one));
            if d != DType::Bool {
                t.output("scatter", g.scatter_add_rows(x, ids, rows));
                t.output("scatter_elements", g.scatter_add_rows(column, ids, elements));
                t.output("scatter_one", g.scatter_add_rows(x, one, row));
            }
            t.check();
        }
    }
}

#[test]
fn reductions() {
    for d in DType::ALL {
        let mut t = Suite::new(&format!("reduce_{d}"));
        let lo = if d.is_signed() { -9.0 } else { 0.0 };
        let hi = if d == DType::Bool { 1.0 } else { 9.0 };
        // Narrow floats: whole numbers, whose partial sums are exact in any order.
        let narrow = matches!(d, DType::BF16 | DType::F16);
        let draw = if narrow { Draw::OneOf(vec![-3.0, -1.0, 0.0, 2.0, 5.0]) } else { Draw::Range(lo, hi) };
        let x = t.input(d, &[2, 3, 4], draw);
        let empty = t.range(d, &[2, 0], lo, hi);
        let g = &t.g;
        for dims in [&[0][..], &[1], &[2], &[0, 2], &[0, 1, 2]] {
            if d != DType::Bool {
                t.output(&format!("sum{dims:?}"), g.reduce_sum(x, dims));
                t.output(&format!("max{dims:?}"), g.reduce_max(x, dims));
                t.output(&format!("min{dims:?}"), g.reduce_min_keep(x, dims));
            }
            if !d.is_float() {
                t.output(&format!("and{dims:?}"), g.reduce_and(x, dims));
                t.output(&format!("or{dims:?}"), g.reduce_or(x, dims));
            }
        }
        // Identities, where the interpreter can hold them.
        if d.is_float() || (d.size() < 8 && d != DType::Bool) {
            t.output("empty_sum", g.reduce_sum(empty, &[1]));
            t.output("empty_max", g.reduce_max(empty, &[1]));
            t.output("empty_min", g.reduce_min(empty, &[1]));
        }
        if !d.is_float() && d != DType::U64 {
            t.output("empty_and", g.reduce_and(empty, &[1]));
            t.output("empty_or", g.reduce_or(empty, &[1]));
        }
        t.check();
    }
}

#[test]
fn products() {
    let pairs = [
        (DType::F32, DType::F32),
        (DType::F64, DType::F64),
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F32),
        (DType::I32, DType::I32),
        (DType::I8, DType::I32),
    ];
    for (d, out) in pairs {
        let mut t = Suite::new(&format!("dot_{d}_{out}"));
        let (a, b) = (t.range(d, &[2, 3, 8], -1.0, 1.0), t.range(d, &[2, 5, 8], -1.0, 1.0));
        let (w, c) = (t.range(d, &[7, 8], -1.0, 1.0), t.range(d, &[8, 2, 3], -1.0, 1.0));
        let g = &t.g;
        let dims = |lb: &[usize], rb: &[usize], lc: &[usize], rc: &[usize]| DotDims {
            lhs_batch: lb.to_vec(),
            rhs_batch: rb.to_vec(),
            lhs_contract: lc.to_vec(),
            rhs_contract: rc.to_vec(),
        };
        t.output("matmul_nt", g.matmul_nt(a, w, out));
        t.output("vector", g.matmul_nt(g.reshape(g.slice_dim(w, 0, 0, 1).unwrap(), [8]).unwrap(), w, out));
        t.output("batched", g.dot_general(a, b, dims(&[0], &[0], &[2], &[2]), out));
        t.output("transposed", g.dot_general(a, c, dims(&[0], &[1], &[2], &[0]), out));
        t.output("gradient", g.dot_general(a, a, dims(&[], &[], &[0, 1], &[0, 1]), out));
        t.output("two_batches", g.dot_general(a, c, dims(&[1, 0], &[2, 1], &[2], &[0]), out));
        t.output("outer", g.dot_general(w, c, dims(&[], &[], &[], &[]), out));
        t.check();
    }
}

#[test]
fn scans() {
    for d in [DType::F32, DType::F64, DType::BF16, DType::I32] {
        for length in [0, 1, 5] {
            let mut t = Suite::new(&format!("scan_{d}_{length}"));
            let (c0, c1) = (t.range(d, &[3], -1.0, 1.0), t.range(DType::I32, &[], 0.0, 9.0));
            let (x0, x1) = (t.range(d, &[length, 3], -1.0, 1.0), t.range(d, &[length], -1.0, 1.0));
            let k = t.range(d, &[3], -1.0, 1.0);
            let body = |b: &Graph, c: &[Value], x: &[Value], k: &[Value]| {
                let next = b.add(b.mul(c[0], k[0])?, x[0])?;
                let next = b.add_bcast(next, x[1])?;
                let count = b.add_scalar(c[1], 1.0)?;
                // A loop in the loop, over the vector's elements.
                let zero = b.scalar(b.dtype(next), 0.0)?;
                let (sum, _) = b.scan(3, &[zero], &[next], &[], |i, c, x, _| Ok((vec![i.add(c[0], x[0])?], vec![])))?;
                Ok((vec![next, count], vec![next, sum[0], count]))
            };
            for (way, (carry, ys)) in [
                ("forward", t.g.scan(length, &[c0, c1], &[x0, x1], &[k], body).unwrap()),
                ("reverse", t.g.scan_reverse(length, &[c0, c1], &[x0, x1], &[k], body).unwrap()),
            ] {
                for (i, v) in carry.into_iter().chain(ys).enumerate() {
                    t.output(&format!("{way}{i}"), Ok(v));
                }
            }
            t.check();
        }
    }
}

#[test]
fn donated_memory() {
    let mut t = Suite::new("donated");
    let donate = || InputOptions { donate: true, ..InputOptions::default() };
    let cache = t.input_with(DType::F32, &[8, 4], Draw::Range(-1.0, 1.0), donate());
    let spare = t.input_with(DType::F32, &[2], Draw::Range(-1.0, 1.0), donate());
    let row = t.range(DType::F32, &[1, 4], -1.0, 1.0);
    let at = t.range(DType::I32, &[], 0.0, 7.0);
    let g = &t.g;
    let zero = g.scalar(DType::I32, 0.0).unwrap();
    let updated = g.dynamic_update_slice(cache, row, &[at, zero]).unwrap();
    g.output_with("cache", updated, OutputOptions { reuse: Some(cache), ..OutputOptions::default() }).unwrap();
    t.output("twice", g.mul_scalar(spare, 2.0));
    t.check();
}

#[test]
fn partitioned_over_four_devices() {
    for d in [DType::F32, DType::F64] {
        let mut t = Suite::new(&format!("mesh_{d}"));
        t.g.set_mesh(&[("fsdp", 2), ("tp", 2)]).unwrap();
        let on = |dims: &[&[&str]], donate| InputOptions { donate, sharding: Some(Sharding::new(dims)) };
        let draw = || Draw::Range(-1.0, 1.0);
        let x = t.input_with(d, &[4, 8], draw(), on(&[&["fsdp"], &[]], false));
        let w1 = t.input_with(d, &[16, 8], draw(), on(&[&["tp"], &["fsdp"]], true));
        let w2 = t.input_with(d, &[8, 16], draw(), on(&[&[], &["fsdp", "tp"]], false));
        let table = t.input_with(d, &[12, 8], draw(), on(&[&["tp", "fsdp"], &[]], false));
        let ids = t.input_with(DType::I32, &[4], Draw::Range(0.0, 11.0), on(&[&["fsdp"]], false));
        let plain = t.range(d, &[8], -1.0, 1.0);
        let g = &t.g;
        let h = g.tanh(g.matmul_nt(x, w1, d).unwrap()).unwrap();
        let h = g.sharding_constraint(h, Sharding::new(&[&["fsdp"], &["tp"]])).unwrap();
        let y = g.add(g.matmul_nt(h, w2, d).unwrap(), g.take(table, ids).unwrap()).unwrap();
        let y = g.add_bcast(y, plain).unwrap();
        let (last, ys) = g
            .scan(4, &[plain], &[y], &[], |b, c, x, _| {
                let next = b.add(b.mul_scalar(c[0], 0.5)?, x[0])?;
                Ok((vec![next], vec![next]))
            })
            .unwrap();
        let to = |dims: &[&[&str]]| OutputOptions { sharding: Some(Sharding::new(dims)), ..OutputOptions::default() };
        g.output_with("y", y, to(&[&["fsdp"], &["tp"]])).unwrap();
        g.output_with("h", h, OutputOptions::default()).unwrap();
        let dw = g
            .dot_general(h, x, DotDims { lhs_contract: vec![0], rhs_contract: vec![0], ..DotDims::default() }, d)
            .unwrap();
        let reuse = OutputOptions { reuse: Some(w1), ..to(&[&["tp"], &["fsdp"]]) };
        g.output_with("dw", dw, reuse).unwrap();
        g.output_with("sum", g.reduce_sum(y, &[0, 1]).unwrap(), to(&[])).unwrap();
        g.output_with("scatter", g.scatter_add_rows(table, ids, y).unwrap(), to(&[&["tp", "fsdp"], &[]])).unwrap();
        g.output_with("last", last[0], to(&[&[]])).unwrap();
        g.output_with("ys", ys[0], to(&[&[], &["fsdp"]])).unwrap();
        t.check_on(4);
    }
}
