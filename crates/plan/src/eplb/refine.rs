//! Local search that lowers the fullest place.

use super::packing::Packing;

/// A change counts only if it gains more than rounding could feign.
const ROUNDING: f64 = 1e-9;

/// Disturbances that [`escape`] tries.
const ATTEMPTS: usize = 128;
/// Max/mean that is not worth more attempts.
const NEARLY_LEVEL: f64 = 1.005;

/// One change of a packing.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// Replicas on two places change places.
    Swap((usize, usize), (usize, usize)),
    /// A replica goes to a free slot.
    Transfer { expert: usize, from: usize, to: usize },
    /// An expert gets a replica in a free slot.
    Grow { expert: usize, place: usize },
    /// An expert gives up a replica that it can spare.
    Shrink { expert: usize, place: usize },
    /// A slot is given from an expert that can spare a replica to another.
    Replace { place: usize, old: usize, new: usize },
}

/// Changes what is on the fullest place until no single change lowers it, or it is at most `target`.
///
/// Each change is the one after which the fullest of the places it touches is least full, and that must be less than the
/// peak was; below the target, the one that moves fewest experts. So either the peak falls, or one place fewer is at it, and the search ends; the limit of rounds bounds its
/// time.
pub(super) fn level(packing: &mut Packing, target: f64) {
    let rounds = 8 * (packing.num_experts() + packing.num_places());
    for _ in 0..rounds {
        let fullest = packing.fullest();
        let peak = packing.loads[fullest];
        if peak <= target {
            return;
        }
        // Below the target all are as good, so the fewest moves decide.
        let key = |after: f64, change: Change| (after.max(target), num_moves(change), after);
        let mut best: Option<((f64, usize, f64), Change)> = None;
        changes(packing, fullest, |after, change| {
            let key = key(after, change);
            if after < peak * (1.0 - ROUNDING) && best.is_none_or(|(least, _)| key < least) {
                best = Some((key, change));
            }
        });
        let Some((_, change)) = best else { return };
        apply(packing, change);
    }
}

/// Tries to leave a local optimum: some replicas change places against all reason, and what [`level`] makes of it is taken if
/// it is better. Ends when the fullest place is nearly the mean, or after a number of attempts.
pub(super) fn escape(packing: &mut Packing) {
    // The disturbance needs variety, not randomness: a multiplicative walk over places and replicas.
    let mut walk = Walk(1);
    for _ in 0..ATTEMPTS {
        if packing.max_over_mean() < NEARLY_LEVEL || packing.num_places() == 1 {
            return;
        }
        let mut disturbed = packing.clone();
        for _ in 0..1 + walk.below(4) {
            disturb(&mut disturbed, &mut walk);
        }
        level(&mut disturbed, 0.0);
        if disturbed.peak() < packing.peak() * (1.0 - ROUNDING) {
            *packing = disturbed;
        }
    }
}

/// One arbitrary change that is legal: a replica goes to another place, is exchanged, or takes the slot of one that can be
/// spared.
fn disturb(packing: &mut Packing, walk: &mut Walk) {
    let replica = |packing: &Packing, walk: &mut Walk| {
        let place = walk.below(packing.num_places());
        let held = &packing.held[place];
        (!held.is_empty()).then(|| (place, held[walk.below(held.len())]))
    };
    let Some((from, expert)) = replica(packing, walk) else { return };
    if packing.holders[expert].len() > 1 && walk.below(4) == 0 {
        return apply(packing, Change::Shrink { expert, place: from });
    }
    let Some((place, other)) = replica(packing, walk) else { return };
    if packing.holds(place, expert) {
        return;
    }
    match walk.below(3) {
        0 if packing.accepts(place, expert) => apply(packing, Change::Transfer { expert, from, to: place }),
        1 if packing.accepts(place, expert) => apply(packing, Change::Grow { expert, place }),
        1 if packing.holders[other].len() > 1 => apply(packing, Change::Replace { place, old: other, new: expert }),
        _ if !packing.holds(from, other) => apply(packing, Change::Swap((from, expert), (place, other))),
        _ => {}
    }
}

/// Numbers without a pattern that matters (the multiplier of Knuth's MMIX generator).
struct Walk(u64);

impl Walk {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }
}

/// Experts that go to a place where they were not.
fn num_moves(change: Change) -> usize {
    match change {
        Change::Shrink { .. } => 0,
        Change::Transfer { .. } | Change::Grow { .. } | Change::Replace { .. } => 1,
        Change::Swap(..) => 2,
    }
}

fn apply(packing: &mut Packing, change: Change) {
    match change {
        Change::Swap(one, other) => packing.swap(one, other),
        Change::Transfer { expert, from, to } => packing.transfer(expert, from, to),
        Change::Grow { expert, place } => packing.add(expert, place),
        Change::Shrink { expert, place } => packing.remove(expert, place),
        Change::Replace { place, old, new } => {
            packing.remove(old, place);
            packing.add(new, place);
        }
    }
}

/// All changes that take something off `full`, each with the greatest load of the places that it touches.
fn changes(packing: &Packing, full: usize, mut found: impl FnMut(f64, Change)) {
    let others = || (0..packing.num_places()).filter(|&place| place != full);
    for &expert in &packing.held[full] {
        let load = packing.replica_load(expert, 0);
        for place in others().filter(|&place| !packing.holds(place, expert)) {
            if packing.free_slots(place) > 0 {
                let after = (packing.loads[full] - load).max(packing.loads[place] + load);
                found(after, Change::Transfer { expert, from: full, to: place });
                found(peak_after(packing, place, None, Some(expert)), Change::Grow { expert, place });
            }
            for &other in &packing.held[place] {
                let other_load = packing.replica_load(other, 0);
                if other_load < load && !packing.holds(full, other) {
                    let gain = load - other_load;
                    let after = (packing.loads[full] - gain).max(packing.loads[place] + gain);
                    found(after, Change::Swap((full, expert), (place, other)));
                }
                // Another replica of an expert of the fullest place, instead of one that can be spared.
                if packing.holders[other].len() > 1 {
                    let after = peak_after(packing, place, Some(other), Some(expert));
                    found(after, Change::Replace { place, old: other, new: expert });
                }
            }
        }
        // The fullest place gives up a replica that can be spared, and takes one of some lighter expert.
        if packing.holders[expert].len() > 1 {
            found(peak_after(packing, full, Some(expert), None), Change::Shrink { expert, place: full });
            for new in (0..packing.num_experts()).filter(|&new| !packing.holds(full, new)) {
                if packing.replica_load(new, 1) < load {
                    let after = peak_after(packing, full, Some(expert), Some(new));
                    found(after, Change::Replace { place: full, old: expert, new });
                }
            }
        }
    }
}

/// The greatest load of all places that hold `old` or `new`, after `new` took the slot of `old` on `place`; without one of
/// them, after the other alone was added or removed.
fn peak_after(packing: &Packing, place: usize, old: Option<usize>, new: Option<usize>) -> f64 {
    let change = |expert, by| packing.replica_load(expert, by) - packing.replica_load(expert, 0);
    let lighter = new.map_or(0.0, |new| change(new, 1));
    let heavier = old.map_or(0.0, |old| change(old, -1));
    let taken = new.map_or(0.0, |new| packing.replica_load(new, 1));
    let given_up = old.map_or(0.0, |old| packing.replica_load(old, 0));
    let mut peak = packing.loads[place] - given_up + taken;
    let holds = |holder, expert: Option<usize>| expert.is_some_and(|expert| packing.holds(holder, expert));
    if let Some(new) = new {
        for &holder in &packing.holders[new] {
            let also_old = if holds(holder, old) { heavier } else { 0.0 };
            peak = peak.max(packing.loads[holder] + lighter + also_old);
        }
    }
    if let Some(old) = old {
        for &holder in packing.holders[old].iter().filter(|&&holder| holder != place && !holds(holder, new)) {
            peak = peak.max(packing.loads[holder] + heavier);
        }
    }
    peak
}
