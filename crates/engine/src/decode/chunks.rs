//! Sizes: of the chunks in which prompts go in, and of the arrays that grow.

/// Chunk sizes. Few, because each is a program of its own; the smallest above 1 still runs at the pace of memory, the
/// largest at that of arithmetic.
pub const CHUNKS: [usize; 4] = [1, 16, 128, 512];

/// Rows of activations for which a product takes little longer than for one: it waits for the weights.
const CHEAP: usize = 16;

/// Positions of the smallest array of a full layer.
const FIRST: usize = 1024;

/// Size of the next chunk when the longest sequence has `left` tokens to go: the smallest that takes all of them, unless more
/// than half of it would be padding that costs something.
pub(super) fn next_chunk(sizes: &[usize], left: usize) -> usize {
    let smallest = sizes.first().copied().unwrap_or(1);
    let below = sizes.iter().copied().rfind(|&s| s <= left).unwrap_or(smallest);
    match sizes.iter().copied().find(|&s| s >= left) {
        Some(above) if above <= 2 * left || above <= CHEAP => above,
        _ => below,
    }
}

/// Positions of an array that must hold `positions`: a power of two, so that few programs serve every length.
pub(super) fn capacity_for(positions: usize) -> usize {
    let wanted = positions.next_power_of_two().max(FIRST);
    // Reading twice what is needed costs little while arrays are small, and saves a program.
    if wanted == 2 * FIRST { 4 * FIRST } else { wanted }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_take_everything_with_little_padding() {
        let split = |mut left: usize| {
            let mut all = Vec::new();
            while left > 0 {
                let c = next_chunk(&CHUNKS, left);
                left -= left.min(c);
                all.push(c);
            }
            all
        };
        assert_eq!(split(1), [1]);
        assert_eq!(split(2), [16]);
        assert_eq!(split(130), [128, 16]);
        assert_eq!(split(300), [512]);
        assert_eq!(split(200), [128, 128]);
        assert_eq!(split(1030), [512, 512, 16]);
        assert_eq!(split(20), [16, 16]);
        for n in 1..3000 {
            let all = split(n);
            let total: usize = all.iter().sum();
            assert!(total >= n && total <= 2 * n + 16, "{n}: {all:?}");
        }
    }

    #[test]
    fn arrays_grow_in_few_steps() {
        assert_eq!(capacity_for(1), 1024);
        assert_eq!(capacity_for(1025), 4096);
        assert_eq!(capacity_for(5000), 8192);
        assert!((1..100_000).all(|n| capacity_for(n) >= n));
    }
}
