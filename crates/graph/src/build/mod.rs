//! The builder methods, by family. Each comes down to one or a few [`Graph::apply`](crate::Graph::apply).

mod constants;
mod elementwise;
mod index;
mod linear;
mod shape;
mod structured;

pub use constants::finite_min;
pub use structured::CarryAndYs;
