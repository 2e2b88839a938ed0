//! The time of a ping-pong pipeline between two pools.
//!
//! A step is cut into `m` equal micro-batches. In each layer, each of them is worked on by the attention pool for `a`
//! seconds, travels for `c`, is worked on by the expert pool for `e`, and travels back for `c`; then comes the next layer.
//! Each pool and each direction of the exchange does one thing at a time, in the order of micro-batches.
//!
//! In the steady state a layer takes `p = max(m a, m e, m c, a + e + 2 c)`: no pool and no direction can serve `m`
//! micro-batches in less than `m` times its time, and no micro-batch can be back before it has gone all the way. The
//! greatest of them is reached, because identical jobs in a fixed order never make a bottleneck wait once it is busy (a
//! cyclic flow shop). The first micro-batch is done with the last layer after `(L - 1) p + a + e + 2 c`, and the others
//! follow one by one through the slowest of the four: `(m - 1) max(a, e, c)` more. So
//!
//! ```text
//! T(m) = (L - 1) p + (a + e + 2 c) + (m - 1) max(a, e, c)
//! ```
//!
//! With `m = 1` that is `L (a + e + 2 c)`: everybody waits for everybody. If `a = e = c`, four micro-batches keep all four
//! busy. Cutting makes `a`, `e` and `c` of a part more than a part of the whole's (weights are read again for each, every
//! message has its latency), which is why more is not always better.

/// Times of one micro-batch in one layer, seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerTimes {
    /// Attention pool.
    pub attention: f64,
    /// Expert pool.
    pub experts: f64,
    /// Exchange, one way.
    pub exchange: f64,
}

/// Seconds of a step of so many layers in so many micro-batches.
pub fn step_time(times: LayerTimes, micro_batches: usize, layers: usize) -> f64 {
    assert!(micro_batches >= 1 && layers >= 1, "{micro_batches} micro-batches, {layers} layers");
    let LayerTimes { attention: a, experts: e, exchange: c } = times;
    let m = micro_batches as f64;
    let slowest = a.max(e).max(c);
    let way = a + e + 2.0 * c;
    (layers - 1) as f64 * way.max(m * slowest) + way + (m - 1.0) * slowest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Event by event: four stations, each with the time at which it is free.
    fn simulate(times: LayerTimes, micro_batches: usize, layers: usize) -> f64 {
        let stations = [times.attention, times.exchange, times.experts, times.exchange];
        let mut free = [0.0f64; 4];
        let mut ready = vec![0.0f64; micro_batches];
        for _ in 0..layers {
            // All micro-batches pass a station in order, so a station's next event depends on what is known already.
            for ready in &mut ready {
                for (station, time) in stations.iter().enumerate() {
                    *ready = ready.max(free[station]) + time;
                    free[station] = *ready;
                }
            }
        }
        ready[micro_batches - 1]
    }

    #[test]
    fn the_formula_is_what_the_events_say() {
        let values = [0.0, 0.3, 1.0, 1.7, 2.0, 5.5];
        for attention in values {
            for experts in values {
                for exchange in values {
                    for micro_batches in 1..=6 {
                        for layers in [1, 2, 3, 16] {
                            let times = LayerTimes { attention, experts, exchange };
                            let (said, right) =
                                (step_time(times, micro_batches, layers), simulate(times, micro_batches, layers));
                            assert!(
                                (said - right).abs() < 1e-9,
                                "{times:?}, {micro_batches} parts, {layers} layers: {said} is said, {right} is right"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn one_part_waits_for_everything_and_four_equal_stations_are_kept_busy_by_four() {
        let times = LayerTimes { attention: 1.0, experts: 1.0, exchange: 1.0 };
        assert_eq!(step_time(times, 1, 10), 40.0);
        // Parts of a quarter each: ten layers of one second, and the pipeline's end.
        let quarter = LayerTimes { attention: 0.25, experts: 0.25, exchange: 0.25 };
        assert_eq!(step_time(quarter, 4, 10), 10.0 + 0.75);
    }
}
