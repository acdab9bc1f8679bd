//! Golden cases: those of the repository, and those of the directory that `LAPIDARY_GOLDEN_DIR` names.

use std::path::{Path, PathBuf};

use checkpoint::safetensors::SafetensorsFile;
use lapidary_engine::Model;
use tensor::HostArray;

/// The directories of all cases.
pub(crate) fn cases() -> Vec<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut roots = vec![own];
    if let Some(dir) = std::env::var_os("LAPIDARY_GOLDEN_DIR") {
        let dir = PathBuf::from(dir);
        assert!(dir.is_dir(), "LAPIDARY_GOLDEN_DIR is not a directory");
        roots.push(dir);
    }
    let mut cases: Vec<PathBuf> = roots
        .iter()
        .flat_map(|r| std::fs::read_dir(r).unwrap().map(|e| e.unwrap().path()))
        .filter(|p| p.join("golden.safetensors").is_file())
        .collect();
    cases.sort();
    cases
}

/// A tensor of a golden file, widened.
pub(crate) fn read(file: &SafetensorsFile, name: &str) -> Option<(Vec<usize>, Vec<f64>)> {
    let view = file.tensor(name)?;
    let host = HostArray::from_bytes(view.dtype, view.shape.clone(), &view.bytes).unwrap();
    Some((view.shape.dims().to_vec(), host.to_f64()))
}

/// The model of a case.
pub(crate) fn open(case: &Path) -> Model {
    let dir = if case.join("model").is_dir() { case.join("model") } else { case.to_owned() };
    Model::open(&dir).unwrap()
}
