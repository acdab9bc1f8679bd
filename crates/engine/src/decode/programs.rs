//! Compiled programs over a cache, one for each chunk size and capacity.

use std::collections::HashMap;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use gemma4::Arch;
use gemma4::cached::{CachedOptions, cached_program, input};
use pjrt::Executable;
use rayon::prelude::*;
use tensor::DType;

use crate::forward::CompileTimes;
use crate::runtime::{Compiler, compile_options};
use crate::{Model, Result};

/// How much less a thread counts whose work is not waited for yet: a third. Not less, for on a busy machine it will be.
const LATER: i32 = 5;

/// A compiled program.
#[derive(Debug)]
pub(super) struct Fed {
    pub(super) executable: Executable,
    /// The parameters it takes, last among its inputs.
    pub(super) params: Vec<String>,
}

/// A program and whether it came from the cache.
type Made = (Fed, bool);

#[derive(Debug, Default)]
pub(super) struct Programs {
    ready: HashMap<CachedOptions, Arc<Fed>>,
    /// Those that another thread compiles.
    pending: Vec<(CachedOptions, JoinHandle<Result<Made>>)>,
    times: CompileTimes,
}

fn make(
    compiler: &Compiler,
    arch: &Arch,
    options: &CachedOptions,
    stored: &(dyn Fn(&str) -> DType + Sync),
) -> Result<Made> {
    let program = cached_program(arch, options, stored)?;
    let fixed = [input::EMBED_ROWS, input::PLE_ROWS, input::START, input::COUNT, input::SESSION];
    let is_param = |name: &str| !fixed.contains(&name) && !name.starts_with("cache.");
    let params = program.inputs.iter().filter(|i| is_param(&i.name)).map(|i| i.name.clone()).collect();
    let compiled = compiler.compile(&program, &compile_options(options.dtype))?;
    Ok((Fed { executable: compiled.executable, params }, compiled.cached))
}

impl Programs {
    /// Programs, and the time that was spent waiting for them.
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

    /// Compiles a program in another thread, unless it is there or coming. [`Programs::compile`] waits for it.
    pub(super) fn begin(
        &mut self,
        compiler: &Compiler,
        model: &Arc<Model>,
        options: CachedOptions,
        stored: impl Fn(&str) -> DType + Send + Sync + 'static,
    ) {
        if self.ready.contains_key(&options) || self.pending.iter().any(|(o, _)| *o == options) {
            return;
        }
        let (compiler, model) = (compiler.clone(), Arc::clone(model));
        let work = move || {
            // What the first token waits for goes first. Where that cannot be arranged, it takes turns.
            let _ = rustix::process::nice(LATER);
            make(&compiler, model.arch(), &options, &stored)
        };
        // Without a thread it is compiled when it is needed.
        if let Ok(thread) = thread::Builder::new().name("compile".to_owned()).spawn(work) {
            self.pending.push((options, thread));
        }
    }

    /// Compiles those programs that are not there yet, side by side, and waits for those that are coming. `stored` gives
    /// the dtype of parameters, and of the token table's rows under [`input::EMBED_ROWS`].
    pub(super) fn compile(
        &mut self,
        compiler: &Compiler,
        arch: &Arch,
        wanted: &[CachedOptions],
        stored: &(dyn Fn(&str) -> DType + Sync),
    ) -> Result<Vec<(CachedOptions, Fed)>> {
        let start = Instant::now();
        let (mut coming, mut missing) = (Vec::new(), Vec::new());
        for options in wanted.iter().filter(|o| !self.ready.contains_key(o)) {
            match self.pending.iter().position(|(o, _)| o == options) {
                Some(at) => coming.push(self.pending.swap_remove(at)),
                None => missing.push(*options),
            }
        }
        let new = missing.par_iter().map(|options| Ok((*options, make(compiler, arch, options, stored)?)));
        let mut new: Vec<(CachedOptions, Made)> = new.collect::<Result<_>>()?;
        for (options, thread) in coming {
            let made = match thread.join() {
                Ok(made) => made?,
                // It panicked; here the panic is seen.
                Err(_) => make(compiler, arch, &options, stored)?,
            };
            new.push((options, made));
        }
        if !new.is_empty() {
            self.times.total += start.elapsed();
        }
        self.times.programs += new.len();
        self.times.cached += new.iter().filter(|(_, (_, cached))| *cached).count();
        Ok(new.into_iter().map(|(options, (fed, _))| (options, fed)).collect())
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        // A process that ends while a plugin compiles would pull the ground from under it.
        for (_, thread) in self.pending.drain(..) {
            let _ = thread.join();
        }
    }
}
