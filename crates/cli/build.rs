//! Lets shared libraries that the program loads use its allocator (`pjrt::export_allocator!`).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // From the build script of `pjrt`; nothing on systems without the macro's entry points.
    let exported = std::env::var("DEP_LAPIDARY_ALLOCATOR_EXPORTED").unwrap_or_default();
    for name in exported.split(',').filter(|name| !name.is_empty()) {
        println!("cargo::rustc-link-arg-bins=-Wl,--export-dynamic-symbol={name}");
    }
}
