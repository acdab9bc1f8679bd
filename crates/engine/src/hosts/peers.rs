//! Other processes that train on other parts of the same batch: sums over all of them, on the host.

use std::fmt;

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

    /// Replaces values by their sums over all processes. The order of summation is the same on all of them.
    ///
    /// # Errors
    /// When a process is gone.
    fn sum(&self, values: &mut [f32]) -> Result<(), PeersError>;
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

    #[test]
    fn rows_are_dealt_out_once() {
        let all: Vec<usize> = (0..4).flat_map(|r| own_rows(8, r, 4).unwrap()).collect();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
        assert!(own_rows(6, 0, 4).unwrap_err().to_string().contains("6 sequences"));
        assert!(own_rows(4, 4, 4).is_err());
    }
}
