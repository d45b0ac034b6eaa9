//! One allocation of ours. Knows how to get and free it, nothing about who may touch which byte.

use std::{
    alloc::{self, Layout},
    mem::ManuallyDrop,
    ptr::NonNull,
};

/// Owned memory. It never makes a reference to its bytes: those who hold it know which part is theirs.
///
/// Invariants: the first `init` bytes at `ptr` are initialised; `ptr` came from the global allocator with `layout`, or
/// `layout` has size 0 and `ptr` dangles.
pub(super) struct Memory {
    ptr: NonNull<u8>,
    layout: Layout,
    init: usize,
}

// SAFETY: `Memory` owns its allocation, which any thread may use and free. It gives out its address and its size; all
// access goes through the types that know which bytes are whose.
unsafe impl Send for Memory {}
// SAFETY: as above; through `&Memory` nothing but the address and the size is to be had.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory, or `None` if there is none or `len` can't be allocated at all.
    ///
    /// `align` must be a power of two.
    pub(super) fn zeroed(len: usize, align: usize) -> Option<Self> {
        // At least one byte: an empty buffer is rare, not worth a second way to make an address.
        let layout = Layout::from_size_align(len.max(1), align).ok()?;
        // SAFETY: `layout` has a size of at least 1.
        let ptr = NonNull::new(unsafe { alloc::alloc_zeroed(layout) })?;
        Some(Self {
            ptr,
            layout,
            init: len,
        })
    }

    /// Takes over what `vec` holds, without a copy.
    pub(super) fn adopt(vec: Vec<u8>) -> Self {
        let mut vec = ManuallyDrop::new(vec);
        let layout = Layout::array::<u8>(vec.capacity()).expect("a Vec's capacity has a layout");
        let ptr = NonNull::new(vec.as_mut_ptr()).expect("a Vec's pointer is never null");
        // `Vec` promises that what it allocated can be freed with the layout of its capacity, and that the pointer
        // of an empty one dangles.
        Self {
            ptr,
            layout,
            init: vec.len(),
        }
    }

    /// The first byte. The pointer may be used for all of the allocation.
    pub(super) fn ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// How many bytes, from the first one on, are initialised and may be used.
    pub(super) fn capacity(&self) -> usize {
        self.init
    }

    /// What the allocator was asked for.
    pub(super) fn alignment(&self) -> usize {
        self.layout.align()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.layout.size() != 0 {
            // SAFETY: `ptr` was allocated with `layout` (invariant) and is freed here only.
            unsafe { alloc::dealloc(self.ptr.as_ptr(), self.layout) }
        }
    }
}
