//! Compile, run, read back.

use lapidary_pjrt::{Code, CompileOptions, OptionValue, PjrtError};
use tensor::{DType, HostArray, Shape};

use crate::common::{client, compile, f32s, put, small_numbers};

pub(crate) const ADD: &str = "module @add {
  func.func public @main(%x: tensor<3xf32>, %y: tensor<3xf32>) -> tensor<3xf32> {
    %r = stablehlo.add %x, %y : tensor<3xf32>
    return %r : tensor<3xf32>
  }
}";

#[test]
fn a_sum() {
    let add = compile(ADD);
    assert_eq!(add.name(), "add");
    assert_eq!(add.signature().inputs.len(), 2);
    assert_eq!(add.signature().outputs[0].shape, Shape::from([3]));
    assert!(add.signature().donated.is_empty());
    let (x, y) = (put(&f32s(&[3], &[1.0, 2.0, 3.0])), put(&f32s(&[3], &[10.0, 20.0, 30.0])));
    let r = add.execute(&[&x, &y]).unwrap();
    assert_eq!(r.len(), 1);
    assert_eq!(r[0].to_host().unwrap().as_slice::<f32>().unwrap(), &[11.0, 22.0, 33.0]);
}

fn matmul(dtype: DType) {
    let (m, k, n) = (5, 16, 7);
    let t = dtype.mlir_name();
    let dot = compile(&format!(
        "func.func @main(%x: tensor<{m}x{k}x{t}>, %y: tensor<{k}x{n}x{t}>) -> tensor<{m}x{n}x{t}> {{
           %r = stablehlo.dot_general %x, %y, contracting_dims = [1] x [0] :
             (tensor<{m}x{k}x{t}>, tensor<{k}x{n}x{t}>) -> tensor<{m}x{n}x{t}>
           return %r : tensor<{m}x{n}x{t}>
         }}"
    ));
    let (a, b) = (small_numbers(m * k, 1), small_numbers(k * n, 2));
    let x = put(&HostArray::from_f64(dtype, [m, k], &a).unwrap());
    let y = put(&HostArray::from_f64(dtype, [k, n], &b).unwrap());
    let r = dot.execute(&[&x, &y]).unwrap()[0].to_host().unwrap();
    assert_eq!(r.dtype(), dtype);
    // Sums of at most 16 products of numbers up to 3: below 2^8, so exact in bf16 too.
    let wanted: Vec<f64> = (0..m * n).map(|i| (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum()).collect();
    assert_eq!(r.to_f64(), wanted);
}

#[test]
fn matrix_products() {
    matmul(DType::F32);
    matmul(DType::BF16);
    matmul(DType::F64);
}

#[test]
fn every_dtype_goes_there_and_back_and_through_a_program() {
    for dtype in DType::ALL {
        for shape in [Shape::from([2, 3]), Shape::scalar(), Shape::from([0, 4])] {
            let n = shape.elements();
            let values: Vec<f64> = (0..n).map(|i| (i % 2) as f64).collect();
            let array = HostArray::from_f64(dtype, shape.clone(), &values).unwrap();
            let buffer = put(&array);
            assert_eq!((buffer.dtype(), buffer.shape()), (dtype, &shape));
            assert_eq!(buffer.to_host().unwrap().bytes(), array.bytes(), "{dtype}{shape}");
            let dims: String = shape.iter().map(|d| format!("{d}x")).collect();
            let t = format!("tensor<{dims}{}>", dtype.mlir_name());
            let same = compile(&format!("func.func @main(%x: {t}) -> {t} {{ return %x : {t} }}"));
            assert_eq!(same.signature().inputs[0].dtype, dtype);
            let back = same.execute(&[&buffer]).unwrap()[0].to_host().unwrap();
            assert_eq!(back.bytes(), array.bytes(), "{dtype}{shape}");
        }
    }
}

#[test]
fn many_results_and_transposed_ones_arrive_in_row_major_order() {
    let both = compile(
        "func.func @main(%x: tensor<2x3xf32>) -> (tensor<3x2xf32>, tensor<2x3xi32>) {
           %t = stablehlo.transpose %x, dims = [1, 0] : (tensor<2x3xf32>) -> tensor<3x2xf32>
           %i = stablehlo.convert %x : (tensor<2x3xf32>) -> tensor<2x3xi32>
           return %t, %i : tensor<3x2xf32>, tensor<2x3xi32>
         }",
    );
    let x = put(&f32s(&[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
    let r = both.execute(&[&x]).unwrap();
    assert_eq!(r[0].to_host().unwrap().as_slice::<f32>().unwrap(), &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_eq!(r[1].to_host().unwrap().as_slice::<i32>().unwrap(), &[0, 1, 2, 3, 4, 5]);
}

#[test]
fn a_program_that_does_not_parse_says_where() {
    let error = client().compile("func.func @main() { stablehlo.nonsense }", &CompileOptions::default()).unwrap_err();
    let PjrtError::Plugin { operation, code, message } = &error else { panic!("{error}") };
    // Errors of the parser carry no better code than this.
    assert_eq!((*operation, *code), ("compile", Code::Unknown));
    assert!(message.contains("nonsense"), "{message}");
}

#[test]
fn programs_that_are_none_are_refused() {
    let alias = "module attributes {mhlo.input_output_alias = []} { func.func @main() { return } }";
    for program in ["", "module {}", "\0", "func.func @main(%x: tensor<?xf32>) { return }", alias] {
        assert!(client().compile(program, &CompileOptions::default()).is_err(), "{program:?}");
    }
}

#[test]
fn a_program_without_arguments_and_one_without_results() {
    let none: [&lapidary_pjrt::Buffer; 0] = [];
    let seven = compile(
        "func.func @main() -> tensor<i32> {
           %c = stablehlo.constant dense<7> : tensor<i32>
           return %c : tensor<i32>
         }",
    );
    assert_eq!(seven.execute(&none).unwrap()[0].to_host().unwrap().to_f64(), [7.0]);
    let nothing = compile("func.func @main(%x: tensor<3xf32>) { return }");
    assert!(nothing.execute(&[&put(&f32s(&[3], &[0.0; 3]))]).unwrap().is_empty());
}

#[test]
fn unknown_and_misspelt_compile_options_are_errors() {
    for (name, value) in [
        ("xla_no_such_flag", OptionValue::Bool(true)),
        ("xla_cpu_use_onednn", OptionValue::String("perhaps".to_owned())),
    ] {
        let error = client().compile(ADD, &CompileOptions::default().with(name, value)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn memory_and_fingerprint_are_known() {
    let add = compile(ADD);
    let memory = add.memory().unwrap();
    assert_eq!((memory.arguments, memory.outputs), (24, 12));
    assert!(!add.fingerprint().unwrap().is_empty());
}

#[test]
fn the_plugin_says_what_it_is() {
    let plugin = client().plugin();
    assert_eq!(plugin.api_version().0, 0);
    assert_eq!(plugin.sha256().len(), 64);
    assert!(plugin.stablehlo_version().is_some(), "{:?}", plugin.attributes());
    assert_eq!(client().platform_name(), "cpu");
    assert_eq!(client().devices().len(), 4);
    assert_eq!(client().device_memory(0).unwrap(), None);
}
