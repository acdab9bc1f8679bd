//! Compiled programs over a cache, one for each chunk size and capacity.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use gemma4::Arch;
use gemma4::cached::{CachedOptions, cached_program, input};
use pjrt::Executable;
use rayon::prelude::*;
use tensor::DType;

use crate::forward::CompileTimes;
use crate::runtime::compile_options;
use crate::{Result, Runtime};

/// A compiled program.
#[derive(Debug)]
pub(super) struct Fed {
    pub(super) executable: Executable,
    /// The parameters it takes, last among its inputs.
    pub(super) params: Vec<String>,
}

#[derive(Debug, Default)]
pub(super) struct Programs {
    ready: HashMap<CachedOptions, Arc<Fed>>,
    times: CompileTimes,
}

impl Programs {
    pub(super) fn times(&self) -> CompileTimes {
        self.times
    }

    /// A program that is ready.
    pub(super) fn get(&self, options: &CachedOptions) -> Option<Arc<Fed>> {
        self.ready.get(options).cloned()
    }

    /// A program whose parameters are placed.
    pub(super) fn insert(&mut self, options: CachedOptions, fed: Fed) {
        self.ready.insert(options, Arc::new(fed));
    }

    /// Compiles those programs that are not there yet, side by side. `stored` gives the dtype of parameters, and of
    /// the token table's rows under [`input::EMBED_ROWS`].
    pub(super) fn compile(
        &mut self,
        runtime: &Runtime,
        arch: &Arch,
        wanted: &[CachedOptions],
        stored: &(dyn Fn(&str) -> DType + Sync),
    ) -> Result<Vec<(CachedOptions, Fed)>> {
        let start = Instant::now();
        let new = wanted.par_iter().filter(|&o| !self.ready.contains_key(o)).map(|options| {
            let program = cached_program(arch, options, stored)?;
            let fixed = [input::EMBED_ROWS, input::PLE_ROWS, input::START, input::COUNT, input::SESSION];
            let is_param = |name: &str| !fixed.contains(&name) && !name.starts_with("cache.");
            let params = program.inputs.iter().filter(|i| is_param(&i.name)).map(|i| i.name.clone()).collect();
            let compiled = runtime.compile(&program, &compile_options(options.dtype))?;
            Ok((*options, Fed { executable: compiled.executable, params }, compiled.cached))
        });
        let new: Vec<(CachedOptions, Fed, bool)> = new.collect::<Result<_>>()?;
        if !new.is_empty() {
            self.times.total += start.elapsed();
        }
        self.times.programs += new.len();
        self.times.cached += new.iter().filter(|(.., cached)| *cached).count();
        Ok(new.into_iter().map(|(options, fed, _)| (options, fed)).collect())
    }
}
