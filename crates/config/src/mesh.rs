//! From the keys of parallelism to a mesh of devices.

use crate::error::{Error, Problem};
use crate::layer::Origin;
use crate::resolved::Mesh;

/// The axes that may have several devices, outermost first.
pub const MESH_AXES: [&str; 6] = ["data", "fsdp", "fsdp_transpose", "context", "tensor", "tensor_sequence"];

/// Sizes of the mesh's axes, nothing left open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshShape {
    /// Devices of a slice along every axis of [`MESH_AXES`].
    pub ici: [usize; 6],
    /// Slices along every axis.
    pub dcn: [usize; 6],
}

impl MeshShape {
    /// Every axis with its number of devices, slices included.
    #[must_use]
    pub fn sizes(&self) -> [(&'static str, usize); 6] {
        std::array::from_fn(|i| (MESH_AXES[i], self.ici[i] * self.dcn[i]))
    }

    /// Number of devices.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.ici.iter().chain(&self.dcn).product()
    }

    /// For every place of the mesh, last axis fastest, the device that stands there. Devices are numbered slice by slice; along
    /// an axis, the devices of one slice are neighbours.
    #[must_use]
    pub fn device_order(&self) -> Vec<usize> {
        let per_slice: usize = self.ici.iter().product();
        (0..self.devices())
            .map(|place| {
                let (mut rest, mut slice, mut within) = (place, 0, 0);
                let (mut slice_stride, mut stride) = (1, 1);
                for axis in (0..MESH_AXES.len()).rev() {
                    let (ici, dcn) = (self.ici[axis], self.dcn[axis]);
                    let at = rest % (ici * dcn);
                    rest /= ici * dcn;
                    within += at % ici * stride;
                    slice += at / ici * slice_stride;
                    stride *= ici;
                    slice_stride *= dcn;
                }
                slice * per_slice + within
            })
            .collect()
    }
}

impl Mesh {
    /// Settles the axes for this many devices, in slices of equal size.
    ///
    /// # Errors
    /// Names the axes whose product is not the number of devices or slices.
    pub fn resolve(&self, devices: usize, slices: usize) -> Result<MeshShape, Error> {
        let slices = slices.max(1);
        if !devices.is_multiple_of(slices) {
            let message = format!("{devices} devices are no {slices} slices of equal size");
            return Err(Error { problems: vec![Problem::new("", &Origin::Default, message)] });
        }
        let (ici, dcn) = (fill("ici", &self.ici, devices / slices), fill("dcn", &self.dcn, slices));
        match (ici, dcn) {
            (Ok(ici), Ok(dcn)) => Ok(MeshShape { ici, dcn }),
            (ici, dcn) => Err(Error { problems: ici.err().into_iter().chain(dcn.err()).collect() }),
        }
    }

    /// Virtual devices that a CPU should have: as many as asked for, else as many as the axes want.
    #[must_use]
    pub fn cpu_devices(&self) -> usize {
        match self.num_cpu_devices {
            0 => self.wanted(),
            n => n,
        }
    }

    /// Slices that the `dcn` axes ask for: what is left to an axis counts as one.
    #[must_use]
    pub fn slices(&self) -> usize {
        asked(&self.dcn)
    }

    /// How many devices the axes ask for: what is left to an axis counts as one.
    #[must_use]
    pub fn wanted(&self) -> usize {
        asked(&self.ici).saturating_mul(asked(&self.dcn))
    }
}

/// The product of axes; what is left to one counts as one.
fn asked(axes: &[i64; 6]) -> usize {
    axes.iter().map(|&n| usize::try_from(n).unwrap_or(1).max(1)).fold(1, usize::saturating_mul)
}

/// Gives what is left to the axis of -1.
fn fill(group: &'static str, axes: &[i64; 6], there: usize) -> Result<[usize; 6], Problem> {
    let noun = |n: usize| match (group, n) {
        ("ici", 1) => "device",
        ("ici", _) => "devices",
        (_, 1) => "slice",
        _ => "slices",
    };
    let given: usize = axes.iter().filter_map(|&n| usize::try_from(n).ok()).fold(1, usize::saturating_mul);
    let open = axes.iter().position(|&n| n < 0);
    let rest = there / given.max(1);
    let fits = given > 0 && there.is_multiple_of(given) && (open.is_some() || rest == 1);
    if !fits {
        let several: Vec<(&str, i64)> = MESH_AXES.into_iter().zip(*axes).filter(|(_, n)| *n > 1).collect();
        let key = format!("{group}_{}_parallelism", several.first().map_or(MESH_AXES[1], |(axis, _)| axis));
        let named: Vec<String> = several.iter().map(|(axis, n)| format!("{group}_{axis}_parallelism={n}")).collect();
        let (axes, wants) = match named.len() {
            0 => ("the axes".to_owned(), "make"),
            1 => (named.concat(), "wants"),
            _ => (named.join(" times "), "make"),
        };
        let are = if there == 1 { "is" } else { "are" };
        let message = format!("{axes} {wants} {given} {}, there {are} {there}", noun(given));
        let hint = match open {
            Some(_) => format!("their product must divide {there}"),
            None => format!("their product must be {there}; -1 gives one axis what the others leave"),
        };
        return Err(Problem::new(&key, &Origin::Default, message).hint(hint));
    }
    Ok(std::array::from_fn(|i| usize::try_from(axes[i]).unwrap_or(rest)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sources;

    fn mesh(words: &[&str]) -> Mesh {
        let all = std::iter::once("model_name=tiny-e2b").chain(words.iter().copied());
        Sources::from_args(all).resolve().unwrap().mesh
    }

    #[test]
    fn what_is_left_goes_to_one_axis() {
        let m = mesh(&["ici_tensor_parallelism=2"]);
        assert_eq!(m.resolve(8, 1).unwrap().ici, [1, 4, 1, 1, 2, 1]);
        assert_eq!(m.wanted(), 2);
        assert_eq!(mesh(&[]).resolve(1, 1).unwrap().devices(), 1);
        let m = mesh(&["ici_data_parallelism=2", "ici_fsdp_parallelism=2", "ici_context_parallelism=2"]);
        assert_eq!(
            m.resolve(8, 1).unwrap().sizes()[..4],
            [("data", 2), ("fsdp", 2), ("fsdp_transpose", 1), ("context", 2)]
        );
        let message = m.resolve(4, 1).unwrap_err().problems[0].to_string();
        assert!(message.contains("make 8 devices, there are 4"), "{message}");
        let m = mesh(&["ici_fsdp_parallelism=-1", "ici_tensor_parallelism=3"]);
        let error = m.resolve(8, 1).unwrap_err();
        assert_eq!(
            error.problems[0].to_string(),
            "ici_tensor_parallelism: ici_tensor_parallelism=3 wants 3 devices, there are 8"
        );
        let error = mesh(&["dcn_data_parallelism=2"]).resolve(8, 1).unwrap_err();
        assert!(error.problems[0].to_string().contains("wants 2 slices, there is 1"), "{error}");
    }

    #[test]
    fn slices_are_the_outer_part_of_every_axis() {
        let m = mesh(&[
            "ici_data_parallelism=2",
            "ici_fsdp_parallelism=2",
            "dcn_fsdp_parallelism=2",
            "dcn_data_parallelism=1",
        ]);
        let shape = m.resolve(8, 2).unwrap();
        assert_eq!(shape.sizes()[..2], [("data", 2), ("fsdp", 4)]);
        // data 0: fsdp 0 and 1 in the first slice, 2 and 3 in the second.
        assert_eq!(shape.device_order(), [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(mesh(&[]).resolve(4, 1).unwrap().device_order(), [0, 1, 2, 3]);
    }
}
