//! Lets shared libraries that a program loads use its allocator (`export_allocator!`): for the examples here, and, by way of
//! cargo's metadata (`DEP_LAPIDARY_ALLOCATOR_EXPORTED`), for the build scripts of crates that depend on this one.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |key: &str| std::env::var(key).unwrap_or_default();
    if target("CARGO_CFG_TARGET_OS") == "linux" && target("CARGO_CFG_TARGET_ENV") == "gnu" {
        let names = [
            "malloc",
            "calloc",
            "realloc",
            "reallocarray",
            "memalign",
            "aligned_alloc",
            "posix_memalign",
            "malloc_usable_size",
            "free",
        ];
        println!("cargo::metadata=EXPORTED={}", names.join(","));
        for name in names {
            println!("cargo::rustc-link-arg-examples=-Wl,--export-dynamic-symbol={name}");
        }
    }
}
