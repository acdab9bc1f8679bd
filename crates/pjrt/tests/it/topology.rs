//! Programs for devices that are not there, and what a compiled program says of itself.

use lapidary_pjrt::{CollectiveKind, CompileOptions, HloStats, Topology};

use crate::common::client;

const SHARDED: &str = r#"
module @m attributes {mhlo.num_partitions = 4 : i32, mhlo.num_replicas = 1 : i32} {
  sdy.mesh @mesh = <["x"=4]>
  func.func public @main(%a: tensor<8x16xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"x"}]>},
                         %b: tensor<16x32xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"x"}, {}]>})
      -> (tensor<8x32xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {}]>}) {
    %c = stablehlo.dot_general %a, %b, contracting_dims = [1] x [0] : (tensor<8x16xf32>, tensor<16x32xf32>) -> tensor<8x32xf32>
    return %c : tensor<8x32xf32>
  }
}"#;

#[test]
fn a_partitioned_product_sums_over_devices() {
    let program = client().compile(SHARDED, &CompileOptions::default().partitioned(4)).unwrap();
    let stats = HloStats::read(&program.optimized_program().unwrap()).unwrap();
    assert_eq!(stats.flops, 2.0 * 8.0 * 32.0 * 4.0);
    let reduce = stats.collectives[&CollectiveKind::AllReduce];
    assert_eq!((reduce.runs, reduce.bytes, reduce.sent), (1.0, 1024.0, 1536.0));
    assert_eq!(stats.collectives.len(), 1);
}

#[test]
fn a_name_that_the_plugin_does_not_know_is_an_error() {
    // Whatever the CPU plugin makes of topologies, it ends in a value or an error.
    if let Ok(t) = Topology::new(client().plugin(), "no such machine", &[]) {
        assert!(t.compile(SHARDED, &CompileOptions::default().partitioned(1 << 19)).is_err());
    }
}
