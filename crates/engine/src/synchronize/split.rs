//! Which rank of the attention pool takes which request.

/// A rank for each request: the longest first, each to the rank with the least so far (longest processing time first; the
/// fullest rank has at most 4/3 of the least that is possible, Graham 1969).
pub fn split(costs: &[f64], ranks: usize) -> Vec<usize> {
    split_onto(costs, &mut vec![0.0; ranks])
}

/// The same onto ranks that have something to do already, which is added to.
pub fn split_onto(costs: &[f64], loads: &mut [f64]) -> Vec<usize> {
    assert!(!loads.is_empty(), "requests need at least one rank");
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by(|&a, &b| costs[b].total_cmp(&costs[a]).then(a.cmp(&b)));
    let mut rank_of = vec![0; costs.len()];
    for request in order {
        let emptiest = (0..loads.len()).min_by(|&a, &b| loads[a].total_cmp(&loads[b])).expect("a rank");
        rank_of[request] = emptiest;
        loads[emptiest] += costs[request];
    }
    rank_of
}
