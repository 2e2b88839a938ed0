mod frames;
mod strangers;
