//! Compiled programs over a cache, one for each chunk size and capacity.

use std::collections::HashMap;
use std::sync::Arc;

use gemma4::Arch;
use gemma4::cached::{CachedOptions, cached_program, input};
use pjrt::Executable;
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
    compiled: HashMap<CachedOptions, Arc<Fed>>,
    times: CompileTimes,
}

impl Programs {
    pub(super) fn times(&self) -> CompileTimes {
        self.times
    }

    /// The program for `options`, compiled if need be. `stored` gives the dtype of parameters, and of
    /// the token table's rows under [`input::EMBED_ROWS`].
    pub(super) fn get(
        &mut self,
        runtime: &Runtime,
        arch: &Arch,
        options: &CachedOptions,
        stored: &dyn Fn(&str) -> DType,
    ) -> Result<Arc<Fed>> {
        if let Some(fed) = self.compiled.get(options) {
            return Ok(fed.clone());
        }
        let program = cached_program(arch, options, stored)?;
        let fixed = [input::EMBED_ROWS, input::PLE_ROWS, input::START, input::COUNT, input::SESSION];
        let is_param = |name: &str| !fixed.contains(&name) && !name.starts_with("cache.");
        let params = program.inputs.iter().filter(|i| is_param(&i.name)).map(|i| i.name.clone()).collect();
        let compiled = runtime.compile(&program, &compile_options(options.dtype))?;
        self.times.programs += 1;
        self.times.cached += usize::from(compiled.cached);
        self.times.total += compiled.time;
        let fed = Arc::new(Fed { executable: compiled.executable, params });
        self.compiled.insert(*options, fed.clone());
        Ok(fed)
    }
}
