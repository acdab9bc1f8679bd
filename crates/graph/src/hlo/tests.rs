use insta::assert_snapshot;
use tensor::{DType, HostArray};

use crate::{Graph, InputOptions, OutputOptions, ProductCalls, Sharding};

#[test]
fn constants_are_exact() {
    let g = Graph::new("constants");
    g.output("a", g.scalar(DType::BF16, 1.5).unwrap()).unwrap();
    g.output("b", g.splat(DType::F32, [2, 2], 0.1).unwrap()).unwrap();
    g.output("c", g.constant(HostArray::from_slice([2, 2], &[1i32, -2, 3, 4]).unwrap()).unwrap()).unwrap();
    g.output("d", g.constant(HostArray::from_bools([2], &[true, false]).unwrap()).unwrap()).unwrap();
    g.output("e", g.constant(HostArray::from_slice([1], &[f64::NEG_INFINITY]).unwrap()).unwrap()).unwrap();
    g.output("f", g.constant(HostArray::zeros(DType::F32, [0, 3]).unwrap()).unwrap()).unwrap();
    assert_snapshot!(g.finish().unwrap().stablehlo(), @r#"
    module @constants {
      func.func public @main() -> (tensor<bf16>, tensor<2x2xf32>, tensor<2x2xi32>, tensor<2xi1>, tensor<1xf64>, tensor<0x3xf32>) {
        %0 = stablehlo.constant dense<0x3FC0> : tensor<bf16>
        %1 = stablehlo.constant dense<0x3DCCCCCD> : tensor<2x2xf32>
        %2 = stablehlo.constant dense<[[1, -2], [3, 4]]> : tensor<2x2xi32>
        %3 = stablehlo.constant dense<[true, false]> : tensor<2xi1>
        %4 = stablehlo.constant dense<[0xFFF0000000000000]> : tensor<1xf64>
        %5 = stablehlo.constant dense<> : tensor<0x3xf32>
        return %0, %1, %2, %3, %4, %5 : tensor<bf16>, tensor<2x2xf32>, tensor<2x2xi32>, tensor<2xi1>, tensor<1xf64>, tensor<0x3xf32>
      }
    }
    "#);
}

#[test]
fn a_layer_with_donation() {
    let g = Graph::new("tiny layer 1");
    let donate = InputOptions { donate: true, ..Default::default() };
    let x = g.input_with("x", DType::BF16, [4, 8], donate.clone()).unwrap();
    let w = g.input("w", DType::BF16, [8, 8]).unwrap();
    let ids = g.input("ids", DType::I32, [4]).unwrap();
    let unused = g.input_with("unused", DType::F32, [2], donate).unwrap();
    g.neg(unused).unwrap();
    let h = g.matmul_nt(x, w, DType::F32).unwrap();
    let s = g.reduce_max_keep(h, &[1]).unwrap();
    let p = g.sub_bcast(h, s).unwrap();
    let p = g.convert(g.exp(p).unwrap(), DType::BF16).unwrap();
    let rows = g.take(w, ids).unwrap();
    let out = g.add(p, rows).unwrap();
    let grad = g.scatter_add_rows(w, ids, out).unwrap();
    g.output_with("y", out, OutputOptions { reuse: Some(x), ..Default::default() }).unwrap();
    g.output("dw", grad).unwrap();
    assert_snapshot!(g.finish().unwrap().stablehlo(), @r#"
    module @tiny_layer_1 {
      func.func public @main(%arg0: tensor<4x8xbf16> {tf.aliasing_output = 0 : i32}, %arg1: tensor<8x8xbf16>, %arg2: tensor<4xi32>, %arg3: tensor<2xf32> {jax.buffer_donor = true}) -> (tensor<4x8xbf16>, tensor<8x8xbf16>) {
        %0 = stablehlo.dot_general %arg0, %arg1, contracting_dims = [1] x [1], precision = [DEFAULT, DEFAULT] : (tensor<4x8xbf16>, tensor<8x8xbf16>) -> tensor<4x8xf32>
        %1 = stablehlo.constant dense<0xFF800000> : tensor<f32>
        %2 = stablehlo.reduce(%0 init: %1) applies stablehlo.maximum across dimensions = [1] : (tensor<4x8xf32>, tensor<f32>) -> tensor<4xf32>
        %3 = stablehlo.reshape %2 : (tensor<4xf32>) -> tensor<4x1xf32>
        %4 = stablehlo.broadcast_in_dim %3, dims = [0, 1] : (tensor<4x1xf32>) -> tensor<4x8xf32>
        %5 = stablehlo.subtract %0, %4 : tensor<4x8xf32>
        %6 = stablehlo.exponential %5 : tensor<4x8xf32>
        %7 = stablehlo.convert %6 : (tensor<4x8xf32>) -> tensor<4x8xbf16>
        %8 = "stablehlo.gather"(%arg1, %arg2) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, indices_are_sorted = false, slice_sizes = array<i64: 1, 8>}> : (tensor<8x8xbf16>, tensor<4xi32>) -> tensor<4x8xbf16>
        %9 = stablehlo.add %7, %8 : tensor<4x8xbf16>
        %10 = "stablehlo.scatter"(%arg1, %arg2, %9) <{indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [1], inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>, unique_indices = false}> ({
        ^bb0(%11: tensor<bf16>, %12: tensor<bf16>):
          %13 = stablehlo.add %11, %12 : tensor<bf16>
          stablehlo.return %13 : tensor<bf16>
        }) : (tensor<8x8xbf16>, tensor<4xi32>, tensor<4x8xbf16>) -> tensor<8x8xbf16>
        return %9, %10 : tensor<4x8xbf16>, tensor<8x8xbf16>
      }
    }
    "#);
}

#[test]
fn a_scan_is_a_while() {
    let g = Graph::new("loop");
    let c = g.input("c", DType::F32, [2]).unwrap();
    let xs = g.input("xs", DType::F32, [3, 2]).unwrap();
    let k = g.input("k", DType::F32, [2]).unwrap();
    let (carry, ys) = g
        .scan_reverse(3, &[c], &[xs], &[k], |b, c, x, k| {
            let next = b.add(b.mul(c[0], k[0])?, x[0])?;
            Ok((vec![next], vec![c[0]]))
        })
        .unwrap();
    g.output("last", carry[0]).unwrap();
    g.output("all", ys[0]).unwrap();
    assert_snapshot!(g.finish().unwrap().stablehlo(), @r#"
    module @loop {
      func.func public @main(%arg0: tensor<2xf32>, %arg1: tensor<3x2xf32>, %arg2: tensor<2xf32>) -> (tensor<2xf32>, tensor<3x2xf32>) {
        %0 = stablehlo.constant dense<0x00000000> : tensor<3x2xf32>
        %1 = stablehlo.constant dense<0> : tensor<i32>
        %2:5 = stablehlo.while(%3 = %1, %4 = %arg0, %5 = %arg1, %6 = %arg2, %7 = %0) : tensor<i32>, tensor<2xf32>, tensor<3x2xf32>, tensor<2xf32>, tensor<3x2xf32>
        cond {
          %8 = stablehlo.constant dense<3> : tensor<i32>
          %9 = stablehlo.compare LT, %3, %8, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>
          stablehlo.return %9 : tensor<i1>
        } do {
          %10 = stablehlo.constant dense<0> : tensor<i32>
          %11 = stablehlo.constant dense<1> : tensor<i32>
          %12 = stablehlo.constant dense<2> : tensor<i32>
          %13 = stablehlo.subtract %12, %3 : tensor<i32>
          %14 = stablehlo.dynamic_slice %5, %13, %10, sizes = [1, 2] : (tensor<3x2xf32>, tensor<i32>, tensor<i32>) -> tensor<1x2xf32>
          %15 = stablehlo.reshape %14 : (tensor<1x2xf32>) -> tensor<2xf32>
          %16 = stablehlo.multiply %4, %6 : tensor<2xf32>
          %17 = stablehlo.add %16, %15 : tensor<2xf32>
          %18 = stablehlo.add %3, %11 : tensor<i32>
          %19 = stablehlo.reshape %4 : (tensor<2xf32>) -> tensor<1x2xf32>
          %20 = stablehlo.dynamic_update_slice %7, %19, %13, %10 : (tensor<3x2xf32>, tensor<1x2xf32>, tensor<i32>, tensor<i32>) -> tensor<3x2xf32>
          stablehlo.return %18, %17, %5, %6, %20 : tensor<i32>, tensor<2xf32>, tensor<3x2xf32>, tensor<2xf32>, tensor<3x2xf32>
        }
        return %2#1, %2#4 : tensor<2xf32>, tensor<3x2xf32>
      }
    }
    "#);
}

#[test]
fn shardings_need_a_mesh() {
    let build = |mesh: bool| {
        let g = Graph::new("sharded");
        if mesh {
            g.set_mesh(&[("fsdp", 2), ("tp", 2)]).unwrap();
        }
        let s = Sharding::new(&[&["fsdp"], &[]]);
        let x = g.input_with("x", DType::F32, [4, 8], InputOptions { donate: true, sharding: Some(s) }).unwrap();
        let y = g.sharding_constraint(x, Sharding::new(&[&[], &["tp", "fsdp"]])).unwrap();
        let both = g.optimization_barrier(&[x, y]).unwrap();
        let sum = g.add(both[0], both[1]).unwrap();
        let sharding = Some(Sharding::replicated(2));
        g.output_with("y", sum, OutputOptions { sharding, ..Default::default() }).unwrap();
        g.output("z", y).unwrap();
        g.finish().unwrap().stablehlo()
    };
    assert_snapshot!(build(true), @r#"
    module @sharded attributes {mhlo.num_partitions = 4 : i32, mhlo.num_replicas = 1 : i32} {
      sdy.mesh @mesh = <["fsdp"=2, "tp"=2]>
      func.func public @main(%arg0: tensor<4x8xf32> {jax.buffer_donor = true, sdy.sharding = #sdy.sharding<@mesh, [{"fsdp"}, {}]>}) -> (tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>}, tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"tp", "fsdp"}]>}) {
        %0 = sdy.sharding_constraint %arg0 <@mesh, [{}, {"tp", "fsdp"}]> : tensor<4x8xf32>
        %1:2 = stablehlo.optimization_barrier %arg0, %0 : tensor<4x8xf32>, tensor<4x8xf32>
        %2 = stablehlo.add %1#0, %1#1 : tensor<4x8xf32>
        return %2, %0 : tensor<4x8xf32>, tensor<4x8xf32>
      }
    }
    "#);
    assert_snapshot!(build(false), @r#"
    module @sharded {
      func.func public @main(%arg0: tensor<4x8xf32> {jax.buffer_donor = true}) -> (tensor<4x8xf32>, tensor<4x8xf32>) {
        %0:2 = stablehlo.optimization_barrier %arg0, %arg0 : tensor<4x8xf32>, tensor<4x8xf32>
        %1 = stablehlo.add %0#0, %0#1 : tensor<4x8xf32>
        return %1, %arg0 : tensor<4x8xf32>, tensor<4x8xf32>
      }
    }
    "#);
}

#[test]
fn products_as_calls() {
    let g = Graph::new("calls");
    let x = g.input("x", DType::BF16, [2, 3, 8]).unwrap();
    let w = g.input("w", DType::BF16, [4, 8]).unwrap();
    g.output("y", g.matmul_nt(x, w, DType::BF16).unwrap()).unwrap();
    // Too little work, and a dtype that is not called.
    let v = g.input("v", DType::F64, [4, 8]).unwrap();
    g.output("z", g.matmul_nt(v, v, DType::F64).unwrap()).unwrap();
    let program = g.finish().unwrap();
    let calls = ProductCalls { target: "f".into(), dtypes: vec![DType::BF16], least_work: 192 };
    let more = ProductCalls { least_work: 193, ..calls.clone() };
    assert_eq!(program.clone().with_product_calls(more).stablehlo(), program.stablehlo());
    assert_snapshot!(program.with_product_calls(calls).stablehlo(), @r#"
    module @calls {
      func.func public @main(%arg0: tensor<2x3x8xbf16>, %arg1: tensor<4x8xbf16>, %arg2: tensor<4x8xf64>) -> (tensor<2x3x4xbf16>, tensor<4x4xf64>) {
        %0 = stablehlo.reshape %arg0 : (tensor<2x3x8xbf16>) -> tensor<1x6x8xbf16>
        %1 = stablehlo.reshape %arg1 : (tensor<4x8xbf16>) -> tensor<1x4x8xbf16>
        %2 = stablehlo.custom_call @f(%0, %1) {api_version = 4 : i32, backend_config = {lhs_transposed = 0 : i64, rhs_transposed = 1 : i64}, operand_layouts = [dense<[2, 1, 0]> : tensor<3xindex>, dense<[2, 1, 0]> : tensor<3xindex>], result_layouts = [dense<[2, 1, 0]> : tensor<3xindex>]} : (tensor<1x6x8xbf16>, tensor<1x4x8xbf16>) -> tensor<1x6x4xbf16>
        %3 = stablehlo.reshape %2 : (tensor<1x6x4xbf16>) -> tensor<2x3x4xbf16>
        %4 = stablehlo.dot_general %arg2, %arg2, contracting_dims = [1] x [1], precision = [DEFAULT, DEFAULT] : (tensor<4x8xf64>, tensor<4x8xf64>) -> tensor<4x4xf64>
        return %3, %4 : tensor<2x3x4xbf16>, tensor<4x4xf64>
      }
    }
    "#);
}
