//! Integration tests: what a user writes, and what comes of it.

// The helpers below stand outside of test functions.
#![allow(clippy::unwrap_used)]

mod checks;
mod layers;
mod maxtext;
mod text;

use std::path::Path;

use lapidary_config::{Config, Error, Sources};

/// Resolves words, without files and environment.
fn resolve(words: &[&str]) -> Result<Config, Error> {
    Sources::from_args(words.iter().copied()).resolve()
}

/// Resolves words on top of the small model.
fn tiny(words: &[&str]) -> Result<Config, Error> {
    resolve(&[&["model_name=tiny-e2b"], words].concat())
}

/// The problems of words on top of the small model, one line each, hints left out.
fn problems(words: &[&str]) -> Vec<String> {
    messages(tiny(words))
}

fn messages(result: Result<Config, Error>) -> Vec<String> {
    result.map_or_else(|error| error.problems.iter().map(ToString::to_string).collect(), |_| Vec::new())
}

/// The only hint of words on top of the small model.
fn hint(words: &[&str]) -> String {
    let error = tiny(words).unwrap_err();
    let hints: Vec<String> = error.problems.into_iter().filter_map(|problem| problem.hint).collect();
    assert_eq!(hints.len(), 1, "{hints:?}");
    hints.into_iter().next().unwrap()
}

/// Writes files into a directory and gives the path of the first.
fn write(dir: &Path, files: &[(&str, &str)]) -> String {
    for (name, text) in files {
        let path = dir.join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, text).unwrap();
    }
    dir.join(files[0].0).to_str().unwrap().to_owned()
}
