//! Processes that share a batch, as threads: together they are the run of one process with the whole batch.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::{Arc, Barrier, Mutex};

use config::Sources;
use lapidary_engine::hosts::peers::{Peers, PeersError};
use lapidary_engine::hosts::{Control, Identity, Origin};
use lapidary_engine::train::{Event, TrainOptions, train};
use lapidary_engine::{Model, Runtime, RuntimeOptions};

/// Sums in shared memory, in the order of ranks.
#[derive(Debug)]
struct Shared {
    count: usize,
    parts: Mutex<Vec<Vec<f32>>>,
    barrier: Barrier,
}

#[derive(Debug)]
struct Thread(usize, Arc<Shared>);

impl Peers for Thread {
    fn rank(&self) -> usize {
        self.0
    }

    fn count(&self) -> usize {
        self.1.count
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), PeersError> {
        self.1.parts.lock().unwrap()[self.0] = values.to_vec();
        self.1.barrier.wait();
        {
            let parts = self.1.parts.lock().unwrap();
            for (i, v) in values.iter_mut().enumerate() {
                *v = parts.iter().map(|p| p[i]).sum();
            }
        }
        self.1.barrier.wait();
        Ok(())
    }
}

fn losses(dir: &Path, rows: usize, steps: usize, peers: Option<&dyn Peers>) -> Vec<f64> {
    let words = [
        "model_name=tiny-e2b".to_owned(),
        "run_name=shared".to_owned(),
        "max_target_length=12".to_owned(),
        "dtype=float32".to_owned(),
        "gradient_accumulation_steps=2".to_owned(),
        "scan_layers=false".to_owned(),
        "checkpoint_period=2".to_owned(),
        "enable_tensorboard=false".to_owned(),
        format!("per_device_batch_size={rows}"),
        format!("steps={steps}"),
        "learning_rate_schedule_steps=4".to_owned(),
        format!("base_output_directory={}", dir.display()),
    ];
    let config = Sources::from_args(words).resolve().unwrap();
    let runtime = Runtime::start(&RuntimeOptions { no_cache: true, ..Default::default() }).unwrap();
    let mut found = Vec::new();
    let mut tell = |event: Event<'_>| {
        if let Event::Step(m) = event {
            found.push(m.loss);
        }
    };
    train(&runtime, &config, TrainOptions { peers, ..TrainOptions::default() }, &mut tell).unwrap();
    found
}

fn shared_losses(dir: &Path, count: usize, rows: usize, steps: usize) -> Vec<f64> {
    let shared = Arc::new(Shared { count, parts: Mutex::new(vec![Vec::new(); count]), barrier: Barrier::new(count) });
    let all: Vec<Vec<f64>> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..count)
            .map(|rank| {
                let shared = Arc::clone(&shared);
                s.spawn(move || losses(dir, rows, steps, Some(&Thread(rank, shared))))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(all.iter().all(|l| *l == all[0]), "{all:?}");
    all[0].clone()
}

#[test]
fn two_share_a_batch_and_go_on_from_one_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let alone = losses(&dir.path().join("alone"), 4, 4, None);
    let shared_dir = dir.path().join("two");
    let mut two = shared_losses(&shared_dir, 2, 2, 2);
    // Started again with more steps: both read the checkpoint that they wrote together.
    two.extend(shared_losses(&shared_dir, 2, 2, 4));
    assert_eq!((alone.len(), two.len()), (4, 4));
    for (a, b) in alone.iter().zip(&two) {
        assert!((a - b).abs() <= 1e-5 * a.abs(), "{alone:?} {two:?}");
    }
    assert!(shared_dir.join("shared/process_1").is_dir());
}

/// Processes of one mesh meet at a store and write one checkpoint. Their devices here are those of one process each, so that both
/// run the whole of every step; what programs say to each other over links is not in this test.
#[test]
fn processes_of_one_mesh_agree_and_save_together() {
    let dir = tempfile::tempdir().unwrap();
    let alone = losses(&dir.path().join("alone"), 4, 4, None);
    let shared_dir = dir.path().join("two");
    let run = |steps: usize| {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let one = |process: usize| {
            let identity = Identity { process, count: 2, coordinator: Some(address.clone()), origin: Origin::Flags };
            let control = Control::start(&identity, b"token").unwrap();
            losses(&shared_dir, 4, steps, Some(&control))
        };
        std::thread::scope(|s| {
            let other = s.spawn(|| one(1));
            let first = one(0);
            assert_eq!(other.join().unwrap(), first);
            first
        })
    };
    let found = [run(2), run(4)].concat();
    assert_eq!(found, alone, "the same steps, over a checkpoint of two");
    let (one, two) = (dir.path().join("alone/shared/checkpoints/4"), shared_dir.join("shared/checkpoints/4"));
    assert!(two.join("model-trained-p00001-00001.safetensors").is_file());
    let (one, two) = (Model::open(&one).unwrap(), Model::open(&two).unwrap());
    for p in gemma4::param_table(one.arch()) {
        assert_eq!(one.read(&p.name).unwrap().bytes(), two.read(&p.name).unwrap().bytes(), "{}", p.name);
    }
}
