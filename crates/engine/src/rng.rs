//! Counter-based random numbers: the value at a counter depends on key and counter alone, not on order or threads.

/// Philox-4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
#[derive(Debug, Clone, Copy)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// The stream of a seed and a label, such as a tensor's name. Streams of different labels are unrelated.
    #[must_use]
    pub fn new(seed: u64, label: &str) -> Self {
        // FNV-1a over the label, mixed with the seed by the cipher itself.
        let hash =
            label.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3));
        let seeded = Philox { key: [seed as u32, (seed >> 32) as u32] };
        let mixed = seeded.block([hash as u32, (hash >> 32) as u32, 0, 0]);
        Philox { key: [mixed[0], mixed[1]] }
    }

    /// Four random words for a counter.
    #[must_use]
    pub fn block(&self, mut c: [u32; 4]) -> [u32; 4] {
        let mut k = self.key;
        for _ in 0..10 {
            let a = u64::from(c[0]) * 0xD251_1F53;
            let b = u64::from(c[2]) * 0xCD9E_8D57;
            c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        c
    }

    /// Four standard normals for block `index` of stream `lane`.
    #[must_use]
    pub fn normals(&self, index: u64, lane: u32) -> [f32; 4] {
        let w = self.block([index as u32, (index >> 32) as u32, lane, 0]);
        let [a, b] = box_muller(w[0], w[1]);
        let [c, d] = box_muller(w[2], w[3]);
        [a, b, c, d]
    }

    /// A standard normal truncated at two standard deviations, for element `index`.
    #[must_use]
    pub fn truncated_normal(&self, index: u64) -> f32 {
        // 4.6 % of the draws fall outside: four draws a block, as many blocks as it takes.
        (0..u32::MAX).flat_map(|lane| self.normals(index, lane)).find(|z| z.abs() <= 2.0).unwrap_or(0.0)
    }
}

/// Two normals from two words.
fn box_muller(a: u32, b: u32) -> [f32; 2] {
    const SCALE: f32 = 1.0 / (1u32 << 24) as f32;
    // (0, 1]: the logarithm never sees zero.
    let u = ((a >> 8) + 1) as f32 * SCALE;
    let angle = (b >> 8) as f32 * SCALE * std::f32::consts::TAU;
    let r = (-2.0 * u.ln()).sqrt();
    [r * angle.cos(), r * angle.sin()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_the_authors() {
        // kat_vectors of Random123: philox4x32 10
        let zero = Philox { key: [0, 0] };
        assert_eq!(zero.block([0; 4]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        let ones = Philox { key: [u32::MAX; 2] };
        assert_eq!(ones.block([u32::MAX; 4]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        let pi = Philox { key: [0xA409_3822, 0x299F_31D0] };
        assert_eq!(
            pi.block([0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344]),
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
        );
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let p = Philox::new(7, "x");
        let n = 50_000;
        let z: Vec<f64> = (0..n).flat_map(|i| p.normals(i, 0)).map(f64::from).collect();
        let mean = z.iter().sum::<f64>() / z.len() as f64;
        let var = z.iter().map(|x| x * x).sum::<f64>() / z.len() as f64;
        let fourth = z.iter().map(|x| x.powi(4)).sum::<f64>() / z.len() as f64;
        assert!(mean.abs() < 0.01 && (var - 1.0).abs() < 0.02 && (fourth - 3.0).abs() < 0.1, "{mean} {var} {fourth}");
    }

    #[test]
    fn truncated_normals_stay_inside_and_keep_their_variance() {
        let p = Philox::new(7, "y");
        let z: Vec<f64> = (0..100_000).map(|i| f64::from(p.truncated_normal(i))).collect();
        let var = z.iter().map(|x| x * x).sum::<f64>() / z.len() as f64;
        assert!(z.iter().all(|x| x.abs() <= 2.0));
        // 1 - 2 * 2 * phi(2) / (2 * Phi(2) - 1)
        assert!((var - 0.773_741_3).abs() < 0.01, "{var}");
    }

    #[test]
    fn labels_give_different_streams() {
        assert_ne!(Philox::new(1, "a").block([0; 4]), Philox::new(1, "b").block([0; 4]));
        assert_ne!(Philox::new(1, "a").block([0; 4]), Philox::new(2, "a").block([0; 4]));
    }
}
