//! Sixteen f32 at a time, for AVX-512.

use std::arch::x86_64::*;

use half::bf16;

/// Lanes of a register.
pub(crate) const LANES: usize = 16;

/// An element as it lies in memory. Where fewer than a register's are there, a mask says which.
pub(crate) trait Element: Copy + Send + Sync {
    /// # Safety
    /// All lanes, or those of the mask, are readable; the machine has the instructions.
    unsafe fn load(from: *const Self, mask: Option<u16>) -> __m512;
    /// Rounded to nearest, ties to even.
    ///
    /// # Safety
    /// All lanes, or those of the mask, are writable; the machine has the instructions.
    unsafe fn store(to: *mut Self, mask: Option<u16>, v: __m512);
    /// As it is after being stored.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn stored(v: __m512) -> __m512;
    fn rounded(v: f32) -> Self;
}

impl Element for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(from: *const f32, mask: Option<u16>) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            match mask {
                None => _mm512_loadu_ps(from),
                Some(mask) => _mm512_maskz_loadu_ps(mask, from),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn store(to: *mut f32, mask: Option<u16>, v: __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            match mask {
                None => _mm512_storeu_ps(to, v),
                Some(mask) => _mm512_mask_storeu_ps(to, mask, v),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn stored(v: __m512) -> __m512 {
        v
    }

    fn rounded(v: f32) -> f32 {
        v
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widened(bits: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

impl Element for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(from: *const bf16, mask: Option<u16>) -> __m512 {
        // SAFETY: the caller's promise.
        let bits = unsafe {
            match mask {
                None => _mm256_loadu_si256(from.cast()),
                Some(mask) => _mm256_maskz_loadu_epi16(mask, from.cast()),
            }
        };
        widened(bits)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn store(to: *mut bf16, mask: Option<u16>, v: __m512) {
        let v = crate::gemm::rounded(v);
        // SAFETY: the caller's promise.
        unsafe {
            match mask {
                None => _mm256_storeu_si256(to.cast(), v),
                Some(mask) => _mm256_mask_storeu_epi16(to.cast(), mask, v),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn stored(v: __m512) -> __m512 {
        widened(crate::gemm::rounded(v))
    }

    fn rounded(v: f32) -> bf16 {
        bf16::from_f32(v)
    }
}

/// A mask of the elements from `at` on of `n`, if they are fewer than a register's.
#[inline]
fn rest(n: usize, at: usize) -> Option<u16> {
    let left = n.saturating_sub(at);
    (left < LANES).then(|| ((1u32 << left) - 1) as u16)
}

/// A mask of the elements from `at` on of `n`.
#[inline]
fn there(n: usize, at: usize) -> u16 {
    rest(n, at).unwrap_or(u16::MAX)
}

/// Elements from `at` on, zeros beyond the end.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn get<T: Element>(x: &[T], at: usize) -> __m512 {
    // SAFETY: what is read is there; the instructions are, too.
    unsafe { T::load(x.as_ptr().wrapping_add(at), rest(x.len(), at)) }
}

/// Writes elements from `at` on as far as there are any.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn put<T: Element>(y: &mut [T], at: usize, v: __m512) {
    let mask = rest(y.len(), at);
    // SAFETY: what is written is there; the instructions are, too.
    unsafe { T::store(y.as_mut_ptr().wrapping_add(at), mask, v) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn all(v: f32) -> __m512 {
    _mm512_set1_ps(v)
}

/// `x` as `n ln 2 + r` with `r` within half of ln 2: `n`, and e^r - 1.
#[inline]
#[target_feature(enable = "avx512f")]
fn parts(x: __m512) -> (__m512, __m512) {
    let (n, r) = crate::exp::reduced(x);
    let mut p = all(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
        p = _mm512_fmadd_ps(p, r, all(c));
    }
    (n, _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, r))
}

/// e to the power of `x`, for `x` up to 80 or so; within 2e-7 of itself.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn exp(x: __m512) -> __m512 {
    // Below this the result is zero in any case. The second operand is what is given for what is no number.
    let (n, rest) = parts(_mm512_max_ps(all(-110.0), x));
    _mm512_scalef_ps(_mm512_add_ps(rest, all(1.0)), n)
}

/// Hyperbolic tangent, within 3e-7 of itself.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn tanh(x: __m512) -> __m512 {
    // Of both signs alike; from 10 on it is one.
    let sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MIN));
    let twice = _mm512_mul_ps(_mm512_abs_ps(x), all(2.0));
    let (n, rest) = parts(_mm512_min_ps(all(20.0), twice));
    // e^2x - 1 without cancellation.
    let power = _mm512_scalef_ps(all(1.0), n);
    let m = _mm512_fmadd_ps(rest, power, _mm512_sub_ps(power, all(1.0)));
    let t = _mm512_div_ps(m, _mm512_add_ps(m, all(2.0)));
    _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(t), sign))
}

/// Rows over the root of their mean square plus `eps`, times a weight; see [`super::rms_norm`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn norm<T: Element>(width: usize, weight: &[f32], eps: f64, x: &[T], y: &mut [T], inverse: &mut [f32]) {
    for ((x, y), inverse) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).zip(inverse) {
        let mut sum = [all(0.0); 4];
        for at in (0..width).step_by(LANES) {
            let v = get(x, at);
            let sum = &mut sum[at / LANES % 4];
            *sum = _mm512_fmadd_ps(v, v, *sum);
        }
        let sum = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
        // One number rounds a whole row: it is worth f64.
        *inverse = (f64::from(_mm512_reduce_add_ps(sum)) / width as f64 + eps).sqrt().recip() as f32;
        let scale = all(*inverse);
        for at in (0..width).step_by(LANES) {
            put(y, at, _mm512_mul_ps(_mm512_mul_ps(get(x, at), scale), get(weight, at)));
        }
    }
}

/// With n = x * inverse: dx = inverse * (ct * w - n * mean(ct * w * n)), and to `sums` is added ct * n.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn norm_gradient<T: Element>(
    weight: &[f32],
    (x, ct): (&[T], &[T]),
    inverse: &[f32],
    dx: &mut [T],
    sums: &mut [f32],
) {
    let width = weight.len();
    let operands = x.chunks_exact(width).zip(ct.chunks_exact(width)).zip(inverse);
    for (((x, ct), &inverse), dx) in operands.zip(dx.chunks_exact_mut(width)) {
        let scale = all(inverse);
        let mut dot = [all(0.0); 2];
        for at in (0..width).step_by(LANES) {
            let (n, ct) = (_mm512_mul_ps(get(x, at), scale), get(ct, at));
            put(sums, at, _mm512_fmadd_ps(ct, n, get(sums, at)));
            let dot = &mut dot[at / LANES % 2];
            *dot = _mm512_fmadd_ps(_mm512_mul_ps(ct, get(weight, at)), n, *dot);
        }
        let mean = all(_mm512_reduce_add_ps(_mm512_add_ps(dot[0], dot[1])) / width as f32);
        for at in (0..width).step_by(LANES) {
            let (n, ct) = (_mm512_mul_ps(get(x, at), scale), get(ct, at));
            let rest = _mm512_sub_ps(_mm512_mul_ps(ct, get(weight, at)), _mm512_mul_ps(n, mean));
            put(dx, at, _mm512_mul_ps(rest, scale));
        }
    }
}

const CUBIC: f32 = 0.044_715;
/// The root of 2 / pi.
const SLOPE: f32 = 0.797_884_6;

/// 1 + tanh(SLOPE * (u + CUBIC * u^3)), and u^2. The sum of both would cancel where the tangent is near -1.
#[inline]
#[target_feature(enable = "avx512f")]
fn bent(u: __m512) -> (__m512, __m512) {
    let square = _mm512_mul_ps(u, u);
    let inner = _mm512_mul_ps(u, _mm512_fmadd_ps(square, all(CUBIC), all(1.0)));
    let e = exp(_mm512_min_ps(all(80.0), _mm512_mul_ps(inner, all(-2.0 * SLOPE))));
    (_mm512_div_ps(all(2.0), _mm512_add_ps(e, all(1.0))), square)
}

/// GELU of `gate`, rounded, times `up`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn gelu<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    for at in (0..y.len()).step_by(LANES) {
        let u = get(gate, at);
        // SAFETY: the instructions are there.
        let gelu = unsafe { T::stored(_mm512_mul_ps(_mm512_mul_ps(u, all(0.5)), bent(u).0)) };
        put(y, at, _mm512_mul_ps(gelu, get(up, at)));
    }
}

/// Its gradient; gelu' = (1 + t) / 2 + u / 2 * (1 - t^2) * slope * (1 + 3 CUBIC u^2).
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn gelu_gradient<T: Element>([gate, up, ct]: [&[T]; 3], d_gate: &mut [T], d_up: &mut [T]) {
    for at in (0..d_up.len()).step_by(LANES) {
        let (u, ct) = (get(gate, at), get(ct, at));
        let (bent, square) = bent(u);
        let inner = _mm512_fmadd_ps(square, all(3.0 * CUBIC * SLOPE), all(SLOPE));
        // 1 - t^2 = (1 + t) * (2 - (1 + t))
        let steep = _mm512_mul_ps(bent, _mm512_sub_ps(all(2.0), bent));
        let slope = _mm512_fmadd_ps(_mm512_mul_ps(u, inner), steep, bent);
        let half = _mm512_mul_ps(ct, all(0.5));
        put(d_gate, at, _mm512_mul_ps(_mm512_mul_ps(half, get(up, at)), slope));
        put(d_up, at, _mm512_mul_ps(_mm512_mul_ps(half, u), bent));
    }
}

/// Logits `cap * tanh(x / cap)` (or `x`) into `capped`, and the largest.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn logits<T: Element>(cap: Option<f32>, x: &[T], capped: &mut [f32]) -> f32 {
    let mut most = all(f32::MIN);
    for at in (0..x.len()).step_by(LANES) {
        let mut v = get(x, at);
        if let Some(cap) = cap {
            v = _mm512_mul_ps(tanh(_mm512_mul_ps(v, all(1.0 / cap))), all(cap));
        }
        most = _mm512_mask_max_ps(most, there(x.len(), at), v, most);
        put(capped, at, v);
    }
    _mm512_reduce_max_ps(most)
}

/// Exponentials of logits less `shift` into `e`; gives their sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn exponentials(logits: &[f32], shift: f32, e: &mut [f32]) -> f32 {
    let mut sum = [all(0.0); 4];
    for at in (0..logits.len()).step_by(LANES) {
        let v = exp(_mm512_sub_ps(get(logits, at), all(shift)));
        let sum = &mut sum[at / LANES % 4];
        *sum = _mm512_mask_add_ps(*sum, there(logits.len(), at), *sum, v);
        put(e, at, v);
    }
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])))
}

/// Exponentials times `factor`, times the slope of the cap.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn by_logits<T: Element>(cap: Option<f32>, logits: &[f32], e: &[f32], factor: f32, d: &mut [T]) {
    for at in (0..d.len()).step_by(LANES) {
        let mut v = _mm512_mul_ps(get(e, at), all(factor));
        if let Some(cap) = cap {
            let t = _mm512_mul_ps(get(logits, at), all(1.0 / cap));
            v = _mm512_mul_ps(v, _mm512_fnmadd_ps(t, t, all(1.0)));
        }
        put(d, at, v);
    }
}

/// Elements whose squares are summed in f32, before f64 takes over.
const BLOCK: usize = 64 * LANES;

/// A step of AdamW; gives the sum of squares of the parameter after it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn adam<T: Element>(a: &super::Adam, p: &mut [f32], mu: &mut [f32], nu: &mut [f32], gradient: &[T]) -> f64 {
    let mut sum = 0.0;
    for from in (0..p.len()).step_by(BLOCK) {
        let mut squares = all(0.0);
        for at in (from..p.len().min(from + BLOCK)).step_by(LANES) {
            let g = _mm512_mul_ps(get(gradient, at), all(a.factor));
            let kept = |old: &[f32], by: [f32; 2], new: __m512| {
                _mm512_add_ps(_mm512_mul_ps(get(old, at), all(by[0])), _mm512_mul_ps(new, all(by[1])))
            };
            let (m, n) = (kept(mu, a.b1, g), kept(nu, a.b2, _mm512_mul_ps(g, g)));
            put(mu, at, m);
            put(nu, at, n);
            let root = _mm512_sqrt_ps(_mm512_add_ps(_mm512_mul_ps(n, all(a.corrections[1])), all(a.eps_root)));
            let step = _mm512_div_ps(_mm512_mul_ps(m, all(a.corrections[0])), _mm512_add_ps(root, all(a.eps)));
            let old = get(p, at);
            let step = _mm512_add_ps(step, _mm512_mul_ps(old, all(a.weight_decay)));
            let new = _mm512_sub_ps(old, _mm512_mul_ps(step, all(a.learning_rate)));
            put(p, at, new);
            // Lanes beyond the end hold zeros, of which the step makes none where `eps` is zero.
            squares = _mm512_mask3_fmadd_ps(new, new, squares, there(p.len(), at));
        }
        sum += f64::from(_mm512_reduce_add_ps(squares));
    }
    sum
}

/// The sum of squares.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn squares<T: Element>(x: &[T]) -> f64 {
    let mut sum = 0.0;
    for from in (0..x.len()).step_by(BLOCK) {
        let mut squares = all(0.0);
        for at in (from..x.len().min(from + BLOCK)).step_by(LANES) {
            let v = get(x, at);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        sum += f64::from(_mm512_reduce_add_ps(squares));
    }
    sum
}

/// `x` plus `added`, and that times a factor, both rounded.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn sum<T: Element>(x: &[T], added: &[T], scale: Option<f32>, y: &mut [T]) {
    for at in (0..y.len()).step_by(LANES) {
        let mut v = _mm512_add_ps(get(x, at), get(added, at));
        if let Some(scale) = scale {
            // SAFETY: the instructions are there.
            v = _mm512_mul_ps(unsafe { T::stored(v) }, all(scale));
        }
        put(y, at, v);
    }
}

/// Turns each element of the first half with that of the second one by an angle.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn turn<T: Element>(x: &mut [T], cos: &[T], sin: &[T]) {
    let (a, b) = x.split_at_mut(cos.len());
    for at in (0..cos.len()).step_by(LANES) {
        let (first, second, cos, sin) = (get(a, at), get(b, at), get(cos, at), get(sin, at));
        put(a, at, _mm512_fmsub_ps(first, cos, _mm512_mul_ps(second, sin)));
        put(b, at, _mm512_fmadd_ps(second, cos, _mm512_mul_ps(first, sin)));
    }
}

/// Makes scores the exponentials of what they are less the largest; gives that and their sum.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn weights(scores: &mut [f32]) -> (f32, f32) {
    let n = scores.len();
    let mut most = all(f32::MIN);
    for at in (0..n).step_by(LANES) {
        most = _mm512_mask_max_ps(most, there(n, at), get(scores, at), most);
    }
    let largest = _mm512_reduce_max_ps(most);
    let mut sum = all(0.0);
    for at in (0..n).step_by(LANES) {
        let e = exp(_mm512_sub_ps(get(scores, at), all(largest)));
        sum = _mm512_mask_add_ps(sum, there(n, at), sum, e);
        put(scores, at, e);
    }
    (largest, _mm512_reduce_add_ps(sum))
}

/// Sums of rows of values, each times the weights of its row: `[H, width]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn values<T: Element, const H: usize, const P: usize>(
    weights: &[[f32; P]; H],
    values: &[T],
    width: usize,
    out: &mut [f32],
) {
    for at in (0..width).step_by(2 * LANES) {
        let mut sums = [[all(0.0); 2]; H];
        for (j, row) in values.chunks_exact(width).take(P).enumerate() {
            let (a, b) = (get(row, at), get(row, at + LANES));
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let weight = all(weights[j]);
                *sums = [_mm512_fmadd_ps(a, weight, sums[0]), _mm512_fmadd_ps(b, weight, sums[1])];
            }
        }
        for (out, sums) in out.chunks_exact_mut(width).zip(sums) {
            put(out, at, sums[0]);
            put(out, at + LANES, sums[1]);
        }
    }
}

/// The sum of rows, each times its weight.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(crate) fn weighted<T: Element>(rows: &[(&[f32], f32)], y: &mut [T]) {
    for at in (0..y.len()).step_by(LANES) {
        let mut sum = all(0.0);
        for (row, weight) in rows {
            sum = _mm512_fmadd_ps(get(row, at), all(*weight), sum);
        }
        put(y, at, sum);
    }
}
