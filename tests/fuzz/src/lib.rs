//! `tests/src/drive` alone, without the rest of that crate and all that it needs: that and the libraries which
//! it drives are all that the sanitizer looks at.

#[path = "../../src/drive/mod.rs"]
pub mod drive;

/// An allocation beyond its limit fails, and that ends the program: a finding.
#[global_allocator]
static ALLOCATOR: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, usize::MAX);

/// From here on, at most `bytes` bytes more are allocated at any time.
pub fn limit_allocations(bytes: usize) {
    let limit = ALLOCATOR.allocated().saturating_add(bytes);
    ALLOCATOR.set_limit(usize::MAX).expect("all is below it");
    ALLOCATOR.set_limit(limit).expect("it is above what is allocated");
}
