//! Several processes under Open MPI's launcher: the losses of one, and an end for all when one is killed.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::train::{alone, losses, train, words, write_text};

fn mpirun(dir: &Path, name: &str, processes: usize, more: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &processes.to_string()]);
    command.arg(env!("CARGO_BIN_EXE_lapidary")).args(words(dir, name, more));
    command
}

/// So small a rate that rounding in another order is not amplified.
const RATE: &str = "learning_rate=1e-5";

#[test]
fn processes_lose_what_one_loses() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    train(dir.path(), "one", &[RATE, "steps=6"]).exits(0);
    let wanted = losses(&dir.path().join("one"));
    for processes in [2, 4] {
        let (name, rows) = (format!("of{processes}"), format!("per_device_batch_size={}", 8 / processes));
        let o = mpirun(dir.path(), &name, processes, &[RATE, "steps=6", &rows]).output().unwrap();
        let said = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.success() && said.contains(&format!("{processes} processes share every batch")), "{said}");
        let found = losses(&dir.path().join(&name));
        assert_eq!(found.len(), 6);
        // Every process wrote its share of the checkpoint.
        let checkpoint = dir.path().join(&name).join("checkpoints/6");
        for p in 1..processes {
            for kind in ["model-trained", "optimizer"] {
                assert!(checkpoint.join(format!("{kind}-p{p:05}-00001.safetensors")).is_file(), "{kind} {p}");
            }
        }
        for (w, f) in wanted.iter().zip(&found) {
            assert!(w.0 == f.0 && (w.1 - f.1).abs() <= 1e-5 * w.1, "{processes}: {w:?} {f:?}");
        }
    }
    // One process goes on from where four of them stopped.
    let rest = train(dir.path(), "of4", &[RATE, "steps=7"]).exits(0);
    assert!(rest.stderr.contains("goes on after step 6"), "{}", rest.stderr);
}

/// The processes that the launcher started.
fn children(of: u32) -> Vec<u32> {
    let list = fs_err::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap();
    list.split_whitespace().map(|p| p.parse().unwrap()).collect()
}

/// Whether a process is there and not merely waiting to be collected.
fn runs(process: u32) -> bool {
    let state = fs_err::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    state.lines().any(|l| l.starts_with("State:") && !l.contains("zombie"))
}

/// Waits for the end; after this long, ends the process and fails.
fn within(child: &mut Child, limit: Duration) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if start.elapsed() > limit {
            child.kill().unwrap();
            panic!("still running {limit:?} after a process was killed");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_killed_process_ends_the_others_and_the_run_goes_on() {
    let _turn = alone();
    let dir = tempfile::tempdir().unwrap();
    write_text(dir.path());
    let more = [RATE, "steps=12", "per_device_batch_size=4"];
    let mut child =
        mpirun(dir.path(), "broken", 2, &more).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let (mut said, mut others) = (String::new(), Vec::new());
    for line in BufReader::new(child.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.starts_with("completed step: 4,") {
            others = children(child.id());
            assert_eq!(others.len(), 2);
            let kill = format!("kill -KILL {}", others[1]);
            assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        }
        said += &line;
        said += "\n";
    }
    assert_ne!(within(&mut child, Duration::from_secs(30)), Some(0), "{said}");
    assert!(said.contains("signal 9") && !said.contains("completed step: 11,"), "{said}");
    let start = Instant::now();
    while others.iter().any(|p| runs(*p)) {
        assert!(start.elapsed() < Duration::from_secs(30), "{others:?} still run");
        std::thread::sleep(Duration::from_millis(50));
    }
    let rest = mpirun(dir.path(), "broken", 2, &more).output().unwrap();
    let said = String::from_utf8_lossy(&rest.stderr);
    assert!(rest.status.success() && said.contains("goes on after step 3"), "{said}");
    assert_eq!(losses(&dir.path().join("broken")).len(), 12);
}
