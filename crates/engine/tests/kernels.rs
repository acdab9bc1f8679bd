//! Programs whose products are computed outside of XLA.

// The helpers of a test may unwrap as the test itself does.
#![allow(clippy::unwrap_used)]

use std::sync::OnceLock;

use graph::{DotDims, Graph, Program, Value};
use half::bf16;
use kernels::{Bytes, Matrix};
use lapidary_engine::kernels::{Session, product_calls, products, register};
use pjrt::plugins::LocateOptions;
use pjrt::{Client, ClientOptions, CompileOptions, Executable, ExecutableCache, Lookup, Plugin};
use tensor::{DType, HostArray};

fn plugin() -> &'static std::sync::Arc<Plugin> {
    static PLUGIN: OnceLock<std::sync::Arc<Plugin>> = OnceLock::new();
    PLUGIN.get_or_init(|| Plugin::load(Plugin::locate("cpu", &LocateOptions::default()).unwrap()).unwrap())
}

fn client() -> Client {
    let client = Client::new(plugin(), &ClientOptions::cpu(1)).unwrap();
    register(&client).unwrap();
    client
}

/// Numbers that bf16 holds exactly, as do their products' sums.
fn numbers(n: usize, seed: usize) -> Vec<f64> {
    (0..n).map(|i| ((i * 37 + seed * 11) % 17) as f64 / 4.0 - 2.0).collect()
}

fn matrix(values: &[f64], n: usize, k: usize, narrow: bool) -> Matrix {
    let bytes: Vec<u8> = match narrow {
        true => values.iter().flat_map(|&v| bf16::from_f64(v).to_le_bytes()).collect(),
        false => values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
    };
    match narrow {
        true => Matrix::bf16(Bytes::from(bytes), n, k).unwrap(),
        false => Matrix::f32(Bytes::from(bytes), n, k).unwrap(),
    }
}

fn reference(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    x.chunks(k).flat_map(|x| w.chunks(k).map(|w| x.iter().zip(w).map(|(a, b)| a * b).sum::<f64>())).collect()
}

/// `2 x` by matrices `wanted`, each as `(number, n, dtype)`.
fn program(m: usize, k: usize, x: DType, wanted: &[(usize, usize, DType)]) -> Program {
    let g = Graph::new("products");
    let session = g.input("session", DType::I64, [1]).unwrap();
    let x = g.input("x", x, [m, k]).unwrap();
    let x = g.add(x, x).unwrap();
    let results = products(&g, session, x, wanted).unwrap();
    for (i, y) in results.into_iter().enumerate() {
        g.output(&format!("y{i}"), y).unwrap();
    }
    g.finish().unwrap()
}

fn run(client: &Client, executable: &Executable, id: i64, x: &HostArray) -> Result<Vec<Vec<f64>>, String> {
    let put = |a: &HostArray| client.buffer_from_host(a, 0).unwrap();
    let (id, x) = (put(&HostArray::from_slice([1], &[id]).unwrap()), put(x));
    let results = executable.execute(&[&id, &x]).map_err(|e| e.to_string())?;
    results.iter().map(|r| r.to_host().map(|a| a.to_f64()).map_err(|e| e.to_string())).collect()
}

#[test]
fn a_stored_program_serves_any_session_and_client() {
    let (m, k) = (3, 40);
    let (a, b, x) = (numbers(24 * k, 1), numbers(7 * k, 2), numbers(m * k, 3));
    let doubled: Vec<f64> = x.iter().map(|v| 2.0 * v).collect();
    let dir = std::env::temp_dir().join(format!("lapidary-products-{}", std::process::id()));
    let cache = ExecutableCache::new(&dir).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        // Results in bf16 would round; they are tried with the small matrix below.
        let text = program(m, k, dtype, &[(1, 7, DType::F32), (0, 24, DType::F32)]).stablehlo();
        for lookup in [Lookup::Miss, Lookup::Hit] {
            // A client of its own each time: what is stored does not depend on the one that compiled it.
            let client = client();
            let (executable, outcome) = client.compile_cached(&text, &CompileOptions::default(), Some(&cache)).unwrap();
            assert_eq!((outcome.lookup, outcome.store_error), (lookup, None));
            for narrow in [true, false] {
                let session = Session::new(vec![matrix(&a, 24, k, narrow), matrix(&b, 7, k, narrow)]);
                let x = HostArray::from_f64(dtype, [m, k], &x).unwrap();
                let results = run(&client, &executable, session.id(), &x).unwrap();
                assert_eq!(results, [reference(&doubled, &b, k), reference(&doubled, &a, k)]);
            }
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn results_in_bf16() {
    let (client, k) = (client(), 8);
    let (w, x) = (numbers(5 * k, 1), numbers(k, 3));
    let text = program(1, k, DType::BF16, &[(0, 5, DType::BF16)]).stablehlo();
    let executable = client.compile(&text, &CompileOptions::default()).unwrap();
    let session = Session::new(vec![matrix(&w, 5, k, true)]);
    let doubled: Vec<f64> = x.iter().map(|v| 2.0 * v).collect();
    let expected: Vec<f64> = reference(&doubled, &w, k).iter().map(|&v| bf16::from_f64(v).to_f64()).collect();
    let x = HostArray::from_f64(DType::BF16, [1, k], &x).unwrap();
    assert_eq!(run(&client, &executable, session.id(), &x).unwrap(), [expected]);
}

#[test]
fn what_does_not_fit_is_an_error_of_the_program() {
    let (client, k) = (client(), 8);
    let session = Session::new(vec![matrix(&numbers(5 * k, 1), 5, k, true)]);
    let x = HostArray::from_f64(DType::F32, [1, k], &numbers(k, 1)).unwrap();
    let outcome = |wanted: &[(usize, usize, DType)], id: i64| {
        let text = program(1, k, DType::F32, wanted).stablehlo();
        let executable = client.compile(&text, &CompileOptions::default()).unwrap();
        run(&client, &executable, id, &x).map(|_| ()).unwrap_err()
    };
    let error = outcome(&[(1, 5, DType::F32)], session.id());
    assert!(error.contains("w0: session") && error.contains("has 1 matrices, no 1"), "{error}");
    let error = outcome(&[(0, 6, DType::F32)], session.id());
    assert!(error.contains("result 0 has room for 6 elements, and 1 rows of 5 are computed"), "{error}");
    let error = outcome(&[(0, 5, DType::F64)], session.id());
    assert!(error.contains("expected an array of"), "{error}");
    let id = session.id();
    drop(session);
    let error = outcome(&[(0, 5, DType::F32)], id);
    assert!(error.contains("there is no session"), "{error}");
}

/// A program whose only ops of interest are products, in all the forms that training has.
fn square_products(dtype: DType) -> Program {
    let g = Graph::new("dots");
    let input = |name: &str, dims: &[usize]| g.input(name, dtype, dims.to_vec()).unwrap();
    let (x, w) = (input("x", &[2, 13, 24]), input("w", &[40, 24]));
    let (q, k) = (input("q", &[2, 3, 20, 8]), input("k", &[2, 3, 17, 8]));
    let dot = |l: Value, r: Value, [lb, rb, lc, rc]: [&[usize]; 4], out: DType| {
        let [lhs_batch, rhs_batch, lhs_contract, rhs_contract] = [lb, rb, lc, rc].map(<[usize]>::to_vec);
        g.dot_general(l, r, DotDims { lhs_batch, rhs_batch, lhs_contract, rhs_contract }, out).unwrap()
    };
    let y = dot(x, w, [&[], &[], &[2], &[1]], dtype);
    let outputs = [
        y,
        dot(y, w, [&[], &[], &[2], &[0]], dtype),
        dot(y, x, [&[], &[], &[0, 1], &[0, 1]], dtype),
        dot(q, k, [&[0, 1], &[0, 1], &[3], &[3]], DType::F32),
        // No call has this form: contracted dimensions surround the free one.
        dot(x, x, [&[], &[], &[0, 2], &[0, 2]], DType::F32),
    ];
    for (i, y) in outputs.into_iter().enumerate() {
        g.output(&format!("y{i}"), y).unwrap();
    }
    g.finish().unwrap()
}

#[test]
fn products_that_are_called_are_those_of_the_compiler() {
    let client = client();
    for dtype in [DType::F32, DType::BF16] {
        // A machine without the instructions leaves products to the compiler.
        let Some(mut calls) = product_calls(dtype) else { continue };
        calls.least_work = 0;
        let plain = square_products(dtype);
        let called = plain.clone().with_product_calls(calls);
        assert_eq!(called.stablehlo().matches("lapidary.matmul").count(), 4);
        let inputs: Vec<HostArray> = plain
            .inputs
            .iter()
            .enumerate()
            .map(|(i, spec)| {
                let values = numbers(spec.shape.elements(), i);
                HostArray::from_f64(dtype, spec.shape.clone(), &values).unwrap()
            })
            .collect();
        let run = |program: &Program| -> Vec<Vec<f64>> {
            let executable = client.compile(&program.stablehlo(), &CompileOptions::verify_f32()).unwrap();
            let buffers: Vec<_> = inputs.iter().map(|a| client.buffer_from_host(a, 0).unwrap()).collect();
            let results = executable.execute(&buffers.iter().collect::<Vec<_>>()).unwrap();
            results.iter().map(|r| r.to_host().unwrap().to_f64()).collect()
        };
        assert_eq!(run(&called), run(&plain), "{dtype}");
    }
}
