use std::path::Path;
use std::sync::Arc;
use lapidary_engine::{golden::Golden, verify, Model, Runtime, RuntimeOptions, Session};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let rt = Runtime::start(&RuntimeOptions::default()).unwrap();
    for case in &a[2..] {
        let m = Arc::new(Model::open(&Path::new(case).join("model")).unwrap());
        let s = Session::new(&rt, m, a[1].parse().unwrap()).unwrap();
        let g = Golden::open(&Path::new(case).join("golden.safetensors")).unwrap();
        let t = verify::Tolerances { max_kl_div: 1e-6, max_abs_diff: Some(2e-4), trace: 1e-4 };
        let v = verify::against_golden(&s, &g, t, gemma4::decoder::Trace::Parts).unwrap();
        let worst = v.trace.iter().map(|t| t.relative).fold(0.0, f64::max);
        println!("{case} pass {} kl {:.2e} abs {:.2e} mean {:.2e} top1 {} trace worst {:.2e} n {} first {:?} compile {:?} fwd {:.3}", v.passed, v.overall.max_kl, v.overall.max_abs_diff, v.overall.mean_abs_diff, v.overall.top1_agreement, worst, v.trace.len(), v.first_divergence, s.compile_times(), v.forward_seconds);
    }
}
