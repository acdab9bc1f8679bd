//! Other processes that train on other parts of the same batch: sums over all of them, on the host.

use std::fmt;

use tensor::HostArray;

/// A sum that did not come about: a process is gone, or the network is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("processes cannot sum their gradients: {0}")]
pub struct PeersError(pub String);

/// The processes of a job as one of them sees them. Every process calls the same operations in the same order.
pub trait Peers: fmt::Debug {
    /// This process, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn count(&self) -> usize;

    /// Whether each process has its own copy of the model and gradients are summed here, on the host. Otherwise the devices of all
    /// processes form one mesh, and the program sums.
    fn sums_gradients(&self) -> bool {
        true
    }

    /// Replaces values by their sums over all processes. The order of summation is the same on all of them.
    ///
    /// # Errors
    /// When a process is gone.
    fn sum(&self, values: &mut [f32]) -> Result<(), PeersError>;
}

/// Values from which an array travels alone; shorter ones share messages, which cost more than their bytes.
const ALONE: usize = 1 << 20;

/// Replaces f32 arrays by their sums over all processes. The order of summation is the same on all of them.
///
/// # Errors
/// When an array is not f32, or a process is gone.
pub fn sum_arrays(peers: &dyn Peers, arrays: &mut [HostArray]) -> Result<(), PeersError> {
    let not_f32 = |e: tensor::HostError| PeersError(e.to_string());
    let mut shared: Vec<f32> = Vec::new();
    let mut within: Vec<(usize, std::ops::Range<usize>)> = Vec::new();
    let flush = |arrays: &mut [HostArray], shared: &mut Vec<f32>, within: &mut Vec<(usize, std::ops::Range<usize>)>| {
        peers.sum(shared)?;
        for (i, range) in within.drain(..) {
            arrays[i].as_mut_slice::<f32>().map_err(not_f32)?.copy_from_slice(&shared[range]);
        }
        shared.clear();
        Ok(())
    };
    for i in 0..arrays.len() {
        let values = arrays[i].as_mut_slice::<f32>().map_err(not_f32)?;
        if values.len() >= ALONE {
            peers.sum(values)?;
            continue;
        }
        within.push((i, shared.len()..shared.len() + values.len()));
        shared.extend_from_slice(values);
        if shared.len() >= ALONE {
            flush(arrays, &mut shared, &mut within)?;
        }
    }
    if !within.is_empty() {
        flush(arrays, &mut shared, &mut within)?;
    }
    Ok(())
}

/// The rows of a batch of all processes that fall to one: `rows / count` neighbours.
///
/// # Errors
/// When rows do not divide.
pub fn own_rows(rows: usize, rank: usize, count: usize) -> Result<std::ops::Range<usize>, PeersError> {
    if count == 0 || !rows.is_multiple_of(count) || rank >= count {
        return Err(PeersError(format!("{rows} sequences cannot be dealt out evenly to {count} processes")));
    }
    let own = rows / count;
    Ok(rank * own..(rank + 1) * own)
}

#[cfg(feature = "mpi")]
pub use self::over_mpi::Mpi;

#[cfg(feature = "mpi")]
mod over_mpi {
    use std::fmt;

    use mpi::collective::SystemOperation;
    use mpi::environment::Universe;
    use mpi::topology::SimpleCommunicator;
    use mpi::traits::{Communicator as _, CommunicatorCollectives as _};

    use super::{Peers, PeersError};

    /// Values of one message: 16 MiB keep caches and shared memory busy.
    const BLOCK: usize = 4 << 20;

    /// Processes started by an MPI launcher. There is one value of it at a time.
    pub struct Mpi {
        world: SimpleCommunicator,
        /// Dropped last: ends MPI.
        _universe: Universe,
    }

    impl fmt::Debug for Mpi {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "Mpi({} of {})", self.world.rank(), self.world.size())
        }
    }

    impl Mpi {
        /// Joins the other processes of the launcher. All calls must come from this thread.
        ///
        /// # Errors
        /// When MPI was started before, or cannot serve a process with other threads.
        pub fn start() -> Result<Self, PeersError> {
            let (universe, threading) = mpi::initialize_with_threading(mpi::Threading::Funneled)
                .ok_or_else(|| PeersError("MPI was started before".to_owned()))?;
            if threading < mpi::Threading::Funneled {
                return Err(PeersError("this MPI cannot serve a process with several threads".to_owned()));
            }
            Ok(Mpi { world: universe.world(), _universe: universe })
        }
    }

    impl Peers for Mpi {
        fn rank(&self) -> usize {
            usize::try_from(self.world.rank()).unwrap_or(0)
        }

        fn count(&self) -> usize {
            usize::try_from(self.world.size()).unwrap_or(1)
        }

        fn sum(&self, values: &mut [f32]) -> Result<(), PeersError> {
            let mut sent = vec![0f32; values.len().min(BLOCK)];
            for block in values.chunks_mut(BLOCK) {
                let own = &mut sent[..block.len()];
                own.copy_from_slice(block);
                // A broken peer ends this process through MPI's error handler, whose launcher tells which one it was.
                self.world.all_reduce_into(&*own, block, SystemOperation::sum());
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As if two processes had the same values; counts messages.
    #[derive(Debug, Default)]
    struct Twice(std::cell::Cell<usize>);

    impl Peers for Twice {
        fn rank(&self) -> usize {
            0
        }
        fn count(&self) -> usize {
            2
        }
        fn sum(&self, values: &mut [f32]) -> Result<(), PeersError> {
            self.0.set(self.0.get() + 1);
            values.iter_mut().for_each(|v| *v *= 2.0);
            Ok(())
        }
    }

    #[test]
    fn short_arrays_share_messages() {
        let sizes = [3, ALONE, 5, ALONE - 6, 0, 7];
        let array = |n: usize| HostArray::from_slice([n], &(0..n).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
        let mut arrays: Vec<HostArray> = sizes.iter().map(|n| array(*n)).collect();
        let peers = Twice::default();
        sum_arrays(&peers, &mut arrays).unwrap();
        // The long one, the three around it, the last two.
        assert_eq!(peers.0.get(), 3);
        for (a, n) in arrays.iter().zip(sizes) {
            assert!(a.as_slice::<f32>().unwrap().iter().enumerate().all(|(i, v)| *v == 2.0 * i as f32), "{n}");
        }
        let mut wrong = [HostArray::from_slice([1], &[1i32]).unwrap()];
        assert!(sum_arrays(&peers, &mut wrong).is_err());
    }

    #[test]
    fn rows_are_dealt_out_once() {
        let all: Vec<usize> = (0..4).flat_map(|r| own_rows(8, r, 4).unwrap()).collect();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
        assert!(own_rows(6, 0, 4).unwrap_err().to_string().contains("6 sequences"));
        assert!(own_rows(4, 4, 4).is_err());
    }
}
