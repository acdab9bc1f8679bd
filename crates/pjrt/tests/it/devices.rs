//! Many devices, many threads.

use lapidary_pjrt::{Buffer, CompileOptions, ExecuteOptions};
use tensor::{HostArray, Shape};

use crate::basics::ADD;
use crate::common::{client, compile, f32s, put, small_numbers};

/// x is split over rows by `data`, w over columns by `model`: each device holds a quarter of the product.
const SHARDED: &str = r#"module @sharded attributes {mhlo.num_partitions = 4 : i32, mhlo.num_replicas = 1 : i32} {
  sdy.mesh @mesh = <["data"=2, "model"=2]>
  func.func public @main(%x: tensor<4x6xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"data"}, {}]>},
                         %w: tensor<6x8xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"model"}]>})
      -> (tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"data"}, {"model"}]>},
          tensor<f32> {sdy.sharding = #sdy.sharding<@mesh, []>}) {
    %y = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<4x6xf32>, tensor<6x8xf32>) -> tensor<4x8xf32>
    %z = stablehlo.constant dense<0.0> : tensor<f32>
    %s = stablehlo.reduce(%y init: %z) applies stablehlo.add across dimensions = [0, 1] : (tensor<4x8xf32>, tensor<f32>) -> tensor<f32>
    return %y, %s : tensor<4x8xf32>, tensor<f32>
  }
}"#;

fn part(all: &[f64], columns: usize, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Vec<f32> {
    rows.flat_map(|r| cols.clone().map(move |c| all[r * columns + c] as f32)).collect()
}

#[test]
fn a_product_over_four_devices() {
    let (x, w) = (small_numbers(4 * 6, 3), small_numbers(6 * 8, 4));
    let y: Vec<f64> = (0..32).map(|i| (0..6).map(|k| x[i / 8 * 6 + k] * w[k * 8 + i % 8]).sum()).collect();
    let program = client().compile(SHARDED, &CompileOptions::default().partitioned(4)).unwrap();
    assert_eq!(program.devices(), [0, 1, 2, 3]);
    assert_eq!(program.signature().inputs[0].shape, Shape::from([2, 6]));
    assert_eq!(program.signature().inputs[1].shape, Shape::from([6, 4]));
    assert_eq!(program.signature().outputs[0].shape, Shape::from([2, 4]));

    let quarter = |device: usize| {
        let (row, col) = (device / 2 * 2, device % 2 * 4);
        (row..row + 2, col..col + 4)
    };
    let buffers: Vec<[Buffer; 2]> = (0..4)
        .map(|device| {
            let (rows, cols) = quarter(device);
            let x = f32s(&[2, 6], &part(&x, 6, rows, 0..6));
            let w = f32s(&[6, 4], &part(&w, 8, 0..6, cols));
            [x, w].map(|a| client().buffer_from_host(&a, device).unwrap())
        })
        .collect();
    let arguments: Vec<Vec<&Buffer>> = buffers.iter().map(|b| b.iter().collect()).collect();
    for (device, results) in program.execute_sharded(&arguments).unwrap().iter().enumerate() {
        let (rows, cols) = quarter(device);
        assert_eq!(results[0].device(), device);
        assert_eq!(results[0].to_host().unwrap().as_slice::<f32>().unwrap(), part(&y, 8, rows, cols));
        assert_eq!(results[1].to_host().unwrap().to_f64(), [y.iter().sum::<f64>()]);
    }
}

#[test]
fn a_program_can_live_on_any_device() {
    let add = client().compile(ADD, &CompileOptions::default().on_devices([2])).unwrap();
    assert_eq!(add.devices(), [2]);
    let x = client().buffer_from_host(&f32s(&[3], &[1.0, 2.0, 3.0]), 2).unwrap();
    let r = add.execute(&[&x, &x]).unwrap();
    assert_eq!(r[0].device(), 2);
    let moved = r[0].copy_to_device(1).unwrap();
    assert_eq!(moved.device(), 1);
    assert_eq!(moved.to_host().unwrap().as_slice::<f32>().unwrap(), &[2.0, 4.0, 6.0]);
    let wrong = put(&f32s(&[3], &[0.0; 3]));
    assert!(add.execute(&[&x, &wrong]).unwrap_err().to_string().contains("device 2"));
}

#[test]
fn two_threads_run_the_same_program() {
    let add = compile(ADD);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let add = &add;
            scope.spawn(move || {
                for i in 0..200 {
                    let v = (thread * 1000 + i) as f32;
                    let x = put(&f32s(&[3], &[v, v + 1.0, v + 2.0]));
                    let r = add.execute(&[&x, &x]).unwrap()[0].to_host().unwrap();
                    assert_eq!(r.as_slice::<f32>().unwrap(), &[2.0 * v, 2.0 * v + 2.0, 2.0 * v + 4.0]);
                }
            });
        }
    });
}

#[test]
fn results_feed_the_next_program_without_waiting() {
    let add = compile(ADD);
    let one = put(&f32s(&[3], &[1.0; 3]));
    let mut sum = put(&HostArray::zeros(tensor::DType::F32, [3]).unwrap());
    for _ in 0..100 {
        sum = add.execute(&[&sum, &one]).unwrap().remove(0);
    }
    let options = ExecuteOptions { wait: true, ..ExecuteOptions::default() };
    let last = add.run(&[[&sum, &one]], &options).unwrap().remove(0).remove(0);
    assert_eq!(last.to_host().unwrap().to_f64(), [101.0; 3]);
}
