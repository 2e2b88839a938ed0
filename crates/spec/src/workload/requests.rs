//! The requests of a workload, drawn from its seed.

use super::{TokenRange, Workload};

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): an odd step through 64 bits, mixed by two multiplications. Small
/// enough to be written here, so that a seed means the same requests in every version and on every machine.
#[derive(Clone, Debug)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0 .. n`: the high half of a product (Lemire 2019), whose bias is below `n / 2⁶⁴`.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn within(&mut self, range: TokenRange) -> usize {
        range.min + self.below(range.max - range.min + 1)
    }
}

impl Workload {
    /// The requests: the token ids of each prompt, all below `vocab_size`, and the number of tokens of its answer. Each
    /// request is drawn from the seed and its own number, so the first requests of a longer workload are the same.
    ///
    /// # Panics
    /// When the vocabulary is empty, which no checked model's is.
    pub fn requests(&self, vocab_size: usize) -> Vec<(Vec<u32>, usize)> {
        assert!(vocab_size > 0, "a vocabulary has tokens");
        let request = |idx: usize| {
            let (num_input, num_output, mut random) = self.draw(idx);
            ((0..num_input).map(|_| random.below(vocab_size) as u32).collect(), num_output)
        };
        (0..self.num_requests).map(request).collect()
    }

    /// Tokens of the prompt and of the answer of each of the same requests.
    pub fn lengths(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.num_requests).map(|idx| {
            let (num_input, num_output, _) = self.draw(idx);
            (num_input, num_output)
        })
    }

    /// Lengths of a request, and the source of its tokens.
    fn draw(&self, idx: usize) -> (usize, usize, SplitMix64) {
        let seed = SplitMix64(self.seed).bits();
        let mut random = SplitMix64(SplitMix64(seed ^ idx as u64).bits());
        let num_input = random.within(self.input_tokens);
        (num_input, random.within(self.output_tokens), random)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Arrival;
    use super::*;

    /// The first values of the published generator for seed 1234567.
    #[test]
    fn the_generator_is_the_published_one() {
        let mut random = SplitMix64(1234567);
        let values = [(); 5].map(|()| random.bits());
        assert_eq!(
            values,
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
        );
    }

    #[test]
    fn requests_follow_from_the_seed_and_their_number() {
        let workload = Workload {
            name: "w".to_owned(),
            num_requests: 200,
            input_tokens: TokenRange { min: 3, max: 9 },
            output_tokens: TokenRange { min: 1, max: 2 },
            seed: 7,
            arrival: Arrival::AtStart,
            prefix_hit: 0.0,
        };
        let requests = workload.requests(11);
        assert_eq!(requests, workload.requests(11));
        let lengths: Vec<_> = requests.iter().map(|(prompt, output)| (prompt.len(), *output)).collect();
        assert_eq!(workload.lengths().collect::<Vec<_>>(), lengths);
        assert_eq!(requests[..50], Workload { num_requests: 50, ..workload.clone() }.requests(11));
        assert_ne!(requests, Workload { seed: 8, ..workload.clone() }.requests(11));
        // Every allowed length and token comes up, and no other.
        let mut lengths: Vec<usize> = requests.iter().map(|(prompt, _)| prompt.len()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        assert_eq!(lengths, [3, 4, 5, 6, 7, 8, 9]);
        let mut tokens: Vec<u32> = requests.iter().flat_map(|(prompt, _)| prompt.clone()).collect();
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens, (0..11).collect::<Vec<u32>>());
        assert!(requests.iter().all(|&(_, output)| (1..=2).contains(&output)));
    }
}
