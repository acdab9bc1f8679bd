//! Operations carried out by Rust code.

use half::bf16;
use lapidary_pjrt::ffi::{Attribute, Call, Handler};
use lapidary_pjrt::{CompileOptions, ExecutableCache, ExecuteOptions, Lookup};
use tensor::HostArray;

use crate::common::{client, compile, f32s, put, small_numbers};

/// `y[n] = scale * sum over k of x[k] w[n, k]`, weights in bf16.
struct DotRows;

impl Handler for DotRows {
    const NAME: &'static str = "test_dot_rows";

    fn call(call: &mut Call<'_>) -> Result<(), String> {
        let Some(Attribute::Int(scale)) = call.attribute("scale") else { return Err("no scale".to_owned()) };
        if call.attribute("label") != Some(Attribute::String("rows".to_owned())) || call.attribute("none").is_some() {
            return Err("wrong attributes".to_owned());
        }
        let (x, w) = (call.inputs[0].as_slice::<f32>()?, call.inputs[1].as_slice::<bf16>()?);
        let y = call.outputs[0].as_mut_slice::<f32>()?;
        for (y, row) in y.iter_mut().zip(w.chunks_exact(x.len())) {
            *y = scale as f32 * x.iter().zip(row).map(|(a, b)| a * b.to_f32()).sum::<f32>();
        }
        Ok(())
    }
}

const PROGRAM: &str = r#"func.func @main(%x: tensor<16xf32>, %w: tensor<9x16xbf16>) -> tensor<9xf32> {
  %r = stablehlo.custom_call @test_dot_rows(%x, %w)
    {api_version = 4 : i32, backend_config = {scale = 2 : i64, label = "rows"}}
    : (tensor<16xf32>, tensor<9x16xbf16>) -> tensor<9xf32>
  %s = stablehlo.add %r, %r : tensor<9xf32>
  return %s : tensor<9xf32>
}"#;

#[test]
fn a_matrix_vector_product() {
    client().register_handler::<DotRows>().unwrap();
    let (x, w) = (small_numbers(16, 5), small_numbers(9 * 16, 6));
    let wanted: Vec<f64> = w.chunks(16).map(|row| 4.0 * row.iter().zip(&x).map(|(a, b)| a * b).sum::<f64>()).collect();
    let x = put(&HostArray::from_f64(tensor::DType::F32, [16], &x).unwrap());
    let w = put(&HostArray::from_f64(tensor::DType::BF16, [9, 16], &w).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let cache = ExecutableCache::new(dir.path()).unwrap();
    for lookup in [Lookup::Miss, Lookup::Hit] {
        let (program, outcome) = client().compile_cached(PROGRAM, &CompileOptions::default(), Some(&cache)).unwrap();
        assert_eq!((outcome.lookup, outcome.store_error), (lookup, None));
        assert_eq!(program.execute(&[&x, &w]).unwrap()[0].to_host().unwrap().to_f64(), wanted);
    }
}

struct Failing;

impl Handler for Failing {
    const NAME: &'static str = "test_failing";

    fn call(call: &mut Call<'_>) -> Result<(), String> {
        match call.inputs[0].as_slice::<f32>()? {
            [v] if *v < 0.0 => Err("negative".to_owned()),
            [v] if *v == 0.0 => panic!("nothing"),
            values => call.outputs[0].as_mut_slice::<f32>().map(|y| y.copy_from_slice(values)),
        }
    }
}

#[test]
fn errors_and_panics_become_errors_of_the_program() {
    client().register_handler::<Failing>().unwrap();
    let program = compile(
        "func.func @main(%x: tensor<1xf32>) -> tensor<1xf32> {
           %r = stablehlo.custom_call @test_failing(%x) {api_version = 4 : i32} : (tensor<1xf32>) -> tensor<1xf32>
           return %r : tensor<1xf32>
         }",
    );
    let wait = ExecuteOptions { wait: true, ..ExecuteOptions::default() };
    for (value, message) in [(-1.0, "\"test_failing\": negative"), (0.0, "panicked: nothing")] {
        let x = put(&f32s(&[1], &[value]));
        let error = program.run(&[[&x]], &wait).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        // Without waiting, the call or the result tells.
        let late = program.execute(&[&x]).and_then(|r| r[0].to_host()).unwrap_err().to_string();
        assert!(late.contains(message), "{late}");
    }
    let x = put(&f32s(&[1], &[3.0]));
    assert_eq!(program.execute(&[&x]).unwrap()[0].to_host().unwrap().to_f64(), [3.0]);
}

#[test]
fn a_handler_nobody_registered_is_an_error() {
    let error = client().compile(&PROGRAM.replace("test_dot_rows", "test_unknown"), &CompileOptions::default());
    assert!(error.unwrap_err().to_string().contains("test_unknown"));
}
