//! What a request for a placement, or a routing trace, may have wrong.

use crate::Rank;

/// Why experts cannot be placed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlaceError {
    /// Nothing to place.
    #[error("loads has 0 experts; a layer that is placed has at least 1")]
    NoExperts,
    /// A load that is none.
    #[error("the load of expert {expert} is {value}; it must be finite and at least 0")]
    Load {
        /// Which expert.
        expert: usize,
        /// Its load.
        value: f64,
    },
    /// A rank that can hold nothing.
    #[error("rank {rank} has 0 slots; leave it out, or give it at least 1")]
    NoSlots {
        /// Which.
        rank: Rank,
    },
    /// A rank is named twice.
    #[error("rank {rank} is named twice; name each rank once, with all its slots")]
    RankTwice {
        /// Which.
        rank: Rank,
    },
    /// Some expert would be nowhere.
    #[error("the ranks have {slots} usable slots for {experts} experts; there must be at least one for each")]
    TooFewSlots {
        /// Slots, of each rank at most as many as there are experts.
        slots: usize,
        /// Experts.
        experts: usize,
    },
    /// Groups that do not divide the experts.
    #[error("groups is {groups}; it must divide the {experts} experts")]
    Groups {
        /// Groups.
        groups: usize,
        /// Experts.
        experts: usize,
    },
    /// A group has no node.
    #[error(
        "the nodes have room for {room} whole groups of {group_size} experts, but there are {groups}; give the nodes more \
         slots, or place globally"
    )]
    GroupsDoNotFit {
        /// Groups that fit.
        room: usize,
        /// Experts of one.
        group_size: usize,
        /// Groups there are.
        groups: usize,
    },
    /// A part of the request is for another layer.
    #[error("{what} is for {found} experts, but the layer has {experts}")]
    OtherExperts {
        /// Which part.
        what: &'static str,
        /// Its experts.
        found: usize,
        /// The layer's.
        experts: usize,
    },
    /// The trace is of another model.
    #[error("the routing trace has {layers} layers, but the model has {wanted}")]
    TraceLayers {
        /// The trace's.
        layers: usize,
        /// The model's.
        wanted: usize,
    },
    /// The trace lacks a layer.
    #[error("the routing trace has nothing for layer {layer}, whose experts are to be placed")]
    NotTraced {
        /// Which.
        layer: usize,
    },
    /// A layer of several cannot be placed.
    #[error("layer {layer}: {fault}")]
    Layer {
        /// Which.
        layer: usize,
        /// Why.
        fault: Box<PlaceError>,
    },
    /// A trace that is no JSON, or has other fields.
    #[error("the routing trace cannot be read: {0}")]
    Json(String),
    /// A trace whose numbers do not belong together.
    #[error("{field} of the routing trace is {value}; {right}")]
    Trace {
        /// Which field, with its layer.
        field: String,
        /// What it is.
        value: String,
        /// What would be right.
        right: String,
    },
}
