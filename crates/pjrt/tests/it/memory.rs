//! Donation, and the host's memory used in place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lapidary_pjrt::plugins::LocateOptions;
use lapidary_pjrt::{
    Client, ClientOptions, CompileOptions, ExecuteOptions, PjrtError, Placement, Plugin, ZERO_COPY_ALIGNMENT,
};
use tensor::{AlignedBytes, DType, HostArray, Shape};

use crate::common::{compile, f32s, put};

/// The first argument becomes the first result.
const DONATING: &str = "func.func @main(%a: tensor<1024xf32> {tf.aliasing_output = 0 : i32}, %b: tensor<1024xf32>)
    -> tensor<1024xf32> {
  %r = stablehlo.add %a, %b : tensor<1024xf32>
  return %r : tensor<1024xf32>
}";

fn vector(value: f32) -> HostArray {
    f32s(&[1024], &[value; 1024])
}

#[test]
fn a_donated_buffer_is_taken_over_and_gone() {
    for attribute in ["tf.aliasing_output = 0 : i32", "jax.buffer_donor = true"] {
        let program = compile(&DONATING.replace("tf.aliasing_output = 0 : i32", attribute));
        assert_eq!(program.signature().donated, [0], "{attribute}");
        assert_eq!(program.memory().unwrap().aliased, 4096);
        let (a, b) = (put(&vector(1.0)), put(&vector(2.0)));
        let address = a.address().unwrap();
        let r = program.execute(&[&a, &b]).unwrap().remove(0);
        assert_eq!(r.address(), Some(address), "{attribute}");
        assert_eq!(r.to_host().unwrap().to_f64(), [3.0; 1024]);
        assert!(a.is_deleted() && !b.is_deleted());
        // Every use of it is an error that says what happened.
        for error in [program.execute(&[&a, &b]).unwrap_err(), a.to_host().unwrap_err(), a.wait().unwrap_err()] {
            assert!(matches!(error, PjrtError::Deleted { .. }), "{error}");
            assert!(error.to_string().contains("donated"), "{error}");
        }
        assert_eq!(a.address(), None);
        assert!(a.copy_to_device(1).is_err());
    }
}

#[test]
fn parts_of_a_buffer_come_by_themselves() {
    let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
    let buffer = put(&f32s(&[2, 3], &values));
    let mut row = [0u8; 12];
    buffer.copy_part_to(12, &mut row).unwrap();
    assert_eq!(row, *HostArray::from_slice([3], &values[3..]).unwrap().bytes());
    buffer.copy_part_to(24, &mut []).unwrap();
    for start in [13, 24, usize::MAX] {
        let error = buffer.copy_part_to(start, &mut row).unwrap_err();
        assert!(matches!(error, PjrtError::Range { len: 24, .. }), "{error}");
    }
    buffer.delete().unwrap();
    assert!(matches!(buffer.copy_part_to(0, &mut row), Err(PjrtError::Deleted { .. })));
}

#[test]
fn a_donated_buffer_can_be_kept_for_one_run() {
    let program = compile(DONATING);
    let (a, b) = (put(&vector(1.0)), put(&vector(2.0)));
    let options = ExecuteOptions { keep: &[0], wait: true };
    let r = program.run(&[[&a, &b]], &options).unwrap().remove(0).remove(0);
    assert_ne!(r.address(), a.address());
    assert_eq!(r.to_host().unwrap().to_f64(), [3.0; 1024]);
    assert_eq!(a.to_host().unwrap().to_f64(), [1.0; 1024]);
}

#[test]
fn the_same_buffer_cannot_be_donated_and_read() {
    let program = compile(DONATING);
    let a = put(&vector(1.0));
    let error = program.execute(&[&a, &a]).unwrap_err();
    assert!(matches!(error, PjrtError::DonatedTwice { index: 0, other: 1, .. }), "{error}");
    // Nothing has run: it is still there, and may be read twice when it is not donated.
    let options = ExecuteOptions { keep: &[0], wait: false };
    let r = program.run(&[[&a, &a]], &options).unwrap().remove(0).remove(0);
    assert_eq!(r.to_host().unwrap().to_f64(), [2.0; 1024]);
}

/// Memory that tells when it is released.
struct Watched(AlignedBytes, Arc<AtomicBool>);

impl AsRef<[u8]> for Watched {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.1.store(true, Ordering::SeqCst);
    }
}

fn watched(values: &HostArray, offset: usize) -> (Arc<Watched>, Arc<AtomicBool>) {
    let mut bytes = AlignedBytes::zeroed(offset + values.bytes().len());
    bytes.as_mut_slice()[offset..].copy_from_slice(values.bytes());
    let released = Arc::new(AtomicBool::new(false));
    (Arc::new(Watched(bytes, Arc::clone(&released))), released)
}

/// A client of its own, because it counts.
fn own_client() -> Client {
    let plugin = Plugin::load(Plugin::locate("cpu", &LocateOptions::default()).unwrap()).unwrap();
    Client::new(&plugin, &ClientOptions::cpu(1)).unwrap()
}

/// The runtime may release memory a moment after the buffer is gone.
fn soon(flag: &AtomicBool) -> bool {
    (0..2000).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        flag.load(Ordering::SeqCst)
    })
}

#[test]
fn aligned_memory_is_used_in_place_and_released_at_the_end() {
    let client = own_client();
    let array = vector(5.0);
    let (owner, released) = watched(&array, 2 * ZERO_COPY_ALIGNMENT);
    let host = owner.as_ref().as_ref()[2 * ZERO_COPY_ALIGNMENT..].as_ptr() as usize;
    let range = 2 * ZERO_COPY_ALIGNMENT..2 * ZERO_COPY_ALIGNMENT + 4096;
    let (buffer, placement) = client.buffer_from_mapped(owner, range, DType::F32, array.shape(), 0).unwrap();
    assert_eq!(placement, Placement::ZeroCopy);
    assert_eq!(buffer.address(), Some(host));
    let program = client.compile(DONATING, &CompileOptions::default()).unwrap();
    let other = client.buffer_from_host(&vector(1.0), 0).unwrap();
    let r = program.execute(&[&other, &buffer]).unwrap().remove(0);
    assert_eq!(r.to_host().unwrap().to_f64(), [6.0; 1024]);
    assert!(!released.load(Ordering::SeqCst));
    drop(buffer);
    assert!(soon(&released));
    let stats = client.transfer_stats();
    assert_eq!((stats.zero_copy, stats.zero_copy_bytes), (1, 4096));
    assert_eq!((stats.mapped_copies, stats.copies, stats.copy_bytes), (0, 1, 4096));
}

#[test]
fn memory_in_use_survives_being_donated() {
    // The runtime must not write to borrowed memory: it copies instead.
    let client = own_client();
    let array = vector(5.0);
    let (owner, released) = watched(&array, 0);
    let (a, placement) = client.buffer_from_mapped(owner.clone(), 0..4096, DType::F32, array.shape(), 0).unwrap();
    assert_eq!(placement, Placement::ZeroCopy);
    let program = client.compile(DONATING, &CompileOptions::default()).unwrap();
    let b = client.buffer_from_host(&vector(1.0), 0).unwrap();
    let r = program.execute(&[&a, &b]).unwrap().remove(0);
    assert_eq!(r.to_host().unwrap().to_f64(), [6.0; 1024]);
    assert_eq!(owner.0.as_slice(), array.bytes());
    drop((a, r, owner));
    assert!(soon(&released));
}

#[test]
fn unaligned_memory_is_copied_and_counted() {
    let client = own_client();
    let array = vector(7.0);
    let (owner, released) = watched(&array, 8);
    let (buffer, placement) = client.buffer_from_mapped(owner, 8..8 + 4096, DType::F32, array.shape(), 0).unwrap();
    assert_eq!(placement, Placement::Copied);
    // The memory is not needed any more, the buffer is still there.
    assert!(soon(&released));
    assert_eq!(buffer.to_host().unwrap().bytes(), array.bytes());
    let stats = client.transfer_stats();
    assert_eq!((stats.mapped_copies, stats.mapped_copy_bytes, stats.zero_copy), (1, 4096, 0));
}

#[test]
fn a_host_array_can_be_handed_over() {
    let client = own_client();
    let array = vector(3.0);
    let host = array.bytes().as_ptr() as usize;
    let (buffer, placement) = client.buffer_from_owned(array, 0).unwrap();
    assert_eq!((placement, buffer.address()), (Placement::ZeroCopy, Some(host)));
    assert_eq!(buffer.to_host().unwrap().to_f64(), [3.0; 1024]);
    let empty = HostArray::zeros(DType::F32, [0, 3]).unwrap();
    let (buffer, placement) = client.buffer_from_owned(empty, 0).unwrap();
    assert_eq!(placement, Placement::Copied);
    assert_eq!(buffer.to_host().unwrap().shape(), &Shape::from([0, 3]));
}

#[test]
fn a_mapped_file_is_used_in_place() {
    let client = own_client();
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, vector(4.0).bytes()).unwrap();
    // SAFETY: nobody else has this file.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let (buffer, placement) =
        client.buffer_from_mapped(Arc::new(map), 0..4096, DType::F32, &Shape::from([1024]), 0).unwrap();
    assert_eq!(placement, Placement::ZeroCopy);
    assert_eq!(buffer.to_host().unwrap().to_f64(), [4.0; 1024]);
}

#[test]
fn ranges_and_sizes_are_checked() {
    let client = own_client();
    let (owner, _) = watched(&vector(1.0), 0);
    let mapped =
        |range, shape: Shape| client.buffer_from_mapped(owner.clone(), range, DType::F32, &shape, 0).unwrap_err();
    let backwards = std::ops::Range { start: 8, end: 4 };
    for range in [0..5000, 4096..4100, backwards, usize::MAX - 1..usize::MAX] {
        assert!(matches!(mapped(range.clone(), Shape::from([1])), PjrtError::Range { .. }), "{range:?}");
    }
    assert!(matches!(mapped(0..8, Shape::from([3])), PjrtError::Size { needed: 12, got: 8, .. }));
    assert!(matches!(mapped(0..8, Shape::from([usize::MAX, 8])), PjrtError::Shape(_)));
    let error = client.buffer_from_bytes(&[0; 4], DType::F32, &Shape::scalar(), 1).unwrap_err();
    assert!(matches!(error, PjrtError::NoSuchDevice { index: 1, count: 1 }), "{error}");
    let buffer = client.buffer_from_host(&vector(1.0), 0).unwrap();
    assert!(matches!(buffer.copy_to(&mut [0; 8]), Err(PjrtError::Size { needed: 4096, got: 8, .. })));
    buffer.delete().unwrap();
    assert!(buffer.is_deleted());
    buffer.delete().unwrap();
}
