//! Lets plugins that examples load use their allocator (`export_allocator!`).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |key: &str| std::env::var(key).unwrap_or_default();
    if target("CARGO_CFG_TARGET_OS") == "linux" && target("CARGO_CFG_TARGET_ENV") == "gnu" {
        for name in [
            "malloc",
            "calloc",
            "realloc",
            "reallocarray",
            "memalign",
            "aligned_alloc",
            "posix_memalign",
            "malloc_usable_size",
            "free",
        ] {
            println!("cargo::rustc-link-arg-examples=-Wl,--export-dynamic-symbol={name}");
        }
    }
}
