//! The requests of a workload, drawn from its seed.

use super::{TokenRange, Workload};

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): an odd step through 64 bits, mixed by two multiplications. Small
/// enough to be written here, so that a seed means the same requests in every version and on every machine.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0 .. n`: the high half of a product (Lemire 2019), whose bias is below `n / 2⁶⁴`.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
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
            let seed = SplitMix64(self.seed).next();
            let mut random = SplitMix64(SplitMix64(seed ^ idx as u64).next());
            let num_input = random.within(self.input_tokens);
            let num_output = random.within(self.output_tokens);
            ((0..num_input).map(|_| random.below(vocab_size) as u32).collect(), num_output)
        };
        (0..self.num_requests).map(request).collect()
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
        let values = [(); 5].map(|()| random.next());
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
