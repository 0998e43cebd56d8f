//! The seeded choices of a storm: xoshiro256** seeded by splitmix64 (Blackman and Vigna).
//!
//! Every choice of a workload comes from here, so a seed and the parameters fix all of them: no clock, no entropy.

/// One step of splitmix64's output function: a bijection on 64 bits that looks random.
pub(crate) const fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A generator.
#[derive(Clone, Debug)]
pub(crate) struct Rng([u64; 4]);

impl Rng {
    /// Stream `stream` of `seed`; every worker has its own, so that none depends on how fast another is.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        let start = mix(seed) ^ mix(stream).rotate_left(32);
        let step = 0x9e37_79b9_7f4a_7c15_u64;
        Self(std::array::from_fn(|i| mix(start.wrapping_add(step.wrapping_mul(i as u64)))))
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= t;
        *d = d.rotate_left(45);
        result
    }

    /// Puts `items` into a random order (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.up_to(last as u64) as usize);
        }
    }

    /// A number from 0 to `most`, both included, each as likely as the others (within 2⁻⁶⁴ × `most`).
    pub(crate) fn up_to(&mut self, most: u64) -> u64 {
        ((u128::from(self.next()) * (u128::from(most) + 1)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_reference_outputs() {
        // xoshiro256** from the state 1, 2, 3, 4: the reference implementation's first outputs.
        let mut rng = Rng([1, 2, 3, 4]);
        assert_eq!([rng.next(), rng.next(), rng.next()], [11520, 0, 1_509_978_240]);
        // splitmix64 from the state 0.
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn seeds_and_streams_differ_and_repeat() {
        let draw = |seed, stream| {
            let mut rng = Rng::new(seed, stream);
            [rng.next(), rng.next()]
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(2, 1));
        assert_ne!(draw(1, 2), draw(1, 3));
    }

    #[test]
    fn up_to_reaches_both_ends_and_stays_inside() {
        let mut rng = Rng::new(7, 0);
        let mut seen = [0_u32; 4];
        for _ in 0..1000 {
            seen[rng.up_to(3) as usize] += 1;
        }
        assert!(seen.iter().all(|&n| n > 150), "{seen:?}");
        assert_eq!(rng.up_to(0), 0);
        assert!(rng.up_to(u64::MAX) > 0);
    }
}
