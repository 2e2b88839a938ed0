//! What ops and messages cost.
//!
//! An op ([`Op`]) is priced in three layers. The **roofline** ([`roofline`]) is what the data sheet says, with launches, tiles
//! and waves. Small networks, trained on all measurements of the op's kind, say by which factor kernels miss it. **Kriging**
//! says the same from what was measured nearby, once for what networks leave over and once without them; the mean of both
//! counts, by how sure each is. A kind with few measurements has no networks. A price says which of them it rests on, and how
//! unsure it is ([`Price`]).
//!
//! Factors are looked up for the device that was measured and are applied to the GPU's own roofline. So a cluster file with
//! more bandwidth or more FLOP/s never makes an op slower, and no price is below [`roofline::bound`].

mod features;
mod learned;
mod link;
mod model;
mod op;
mod own;
mod params;
pub mod published;
pub mod roofline;
mod skew;
mod table;
pub mod validate;

pub use crate::price::{Price, Source};
pub use learned::{Family, Learned, Widening};
pub use link::{LinkPrice, Roofline};
pub use model::CostModel;
pub use op::{Op, Phase, Precision};
pub use own::{LeftOut, OwnOps};
pub use skew::touched;
pub use table::{Row, Stack, parse};
