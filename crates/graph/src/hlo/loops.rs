//! A scan as a `while` over: step counter, carry, xs, consts, stacked ys.
//!
//! Step `i` reads slice `i` of every x (of a reversed scan: slice `length - 1 - i`) and writes its ys at the same place. Only
//! the counter, the carry and the ys change; xs and consts go round untouched, which compilers recognise as invariant.

use tensor::{DType, Shape};

use super::literal::{list, tensor, zero};
use super::{Names, Printer};
use crate::infer::stacked;
use crate::op::{Body, Node, Scan, TensorType};

impl Printer<'_> {
    pub(super) fn scan(&mut self, outer: &Body, node: &Node, scan: &Scan, names: &mut Names) {
        let body: &Body = &scan.body;
        let ys: Vec<TensorType> =
            body.outputs()[scan.carry..].iter().map(|&v| stacked(body.ty(v), scan.length)).collect();
        let zeros: Vec<String> = ys
            .iter()
            .map(|ty| {
                // An array without elements has no element to fill it with.
                let fill = if ty.shape.elements() == 0 { String::new() } else { zero(ty.dtype) };
                self.define(&format!("stablehlo.constant dense<{fill}> : {}", tensor(ty)))
            })
            .collect();
        if scan.length == 0 {
            let carried = node.inputs()[..scan.carry].iter().map(|&v| names.get(v).to_owned());
            let all: Vec<String> = carried.chain(zeros).collect();
            for (v, name) in node.outputs().zip(all) {
                names.set(v, name);
            }
            return;
        }

        let counter_ty =
            TensorType::new(if i32::try_from(scan.length).is_ok() { DType::I32 } else { DType::I64 }, Shape::scalar());
        let counter = tensor(&counter_ty);
        let start = self.define(&format!("stablehlo.constant dense<0> : {counter}"));
        // What goes round: initial values, then types, then the names inside.
        let mut initial = vec![start];
        initial.extend(node.inputs().iter().map(|&v| names.get(v).to_owned()));
        initial.extend(zeros);
        let mut types = vec![counter.clone()];
        types.extend(node.inputs().iter().map(|&v| tensor(outer.ty(v))));
        types.extend(ys.iter().map(tensor));

        let result = self.fresh();
        let inside: Vec<String> = initial.iter().map(|_| self.fresh()).collect();
        let pairs = list(inside.iter().zip(&initial).map(|(a, b)| format!("{a} = {b}")));
        self.line(&format!("{result}:{} = stablehlo.while({pairs}) : {}", initial.len(), list(&types)));
        self.line("cond {");
        self.depth += 1;
        let limit = self.define(&format!("stablehlo.constant dense<{}> : {counter}", scan.length));
        let more = self.define(&format!(
            "stablehlo.compare LT, {}, {limit}, SIGNED : ({counter}, {counter}) -> tensor<i1>",
            inside[0]
        ));
        self.line(&format!("stablehlo.return {more} : tensor<i1>"));
        self.depth -= 1;
        self.line("} do {");
        self.depth += 1;
        let next = self.step(scan, &inside, &types, &counter);
        self.line(&format!("stablehlo.return {} : {}", list(&next), list(&types)));
        self.depth -= 1;
        self.line("}");

        // Results among what went round: the carry behind the counter, the ys at the end.
        for (i, v) in node.outputs().enumerate() {
            let place = if i < scan.carry { 1 + i } else { i - scan.carry + 1 + scan.carry + scan.xs + scan.consts };
            names.set(v, format!("{result}#{place}"));
        }
    }

    /// One step: prints the body and returns what goes round next.
    fn step(&mut self, scan: &Scan, inside: &[String], types: &[String], counter: &str) -> Vec<String> {
        let body: &Body = &scan.body;
        let zero = self.define(&format!("stablehlo.constant dense<0> : {counter}"));
        let one = self.define(&format!("stablehlo.constant dense<1> : {counter}"));
        let place = if scan.reverse {
            let last = self.define(&format!("stablehlo.constant dense<{}> : {counter}", scan.length - 1));
            self.define(&format!("stablehlo.subtract {last}, {} : {counter}", inside[0]))
        } else {
            inside[0].clone()
        };
        let start = |rank: usize| {
            let places = std::iter::once(place.as_str()).chain(std::iter::repeat_n(zero.as_str(), rank));
            (list(places), list(std::iter::repeat_n(counter, rank + 1)))
        };

        let mut names = Names(vec![String::new(); body.values().len()]);
        for (i, &v) in body.inputs().iter().enumerate() {
            let outside = &inside[1 + i];
            if !(scan.carry..scan.carry + scan.xs).contains(&i) {
                names.set(v, outside.clone());
                continue;
            }
            let ty = body.ty(v);
            let (places, place_types) = start(ty.shape.rank());
            let row = stacked(ty, 1);
            let slice = self.define(&format!(
                "stablehlo.dynamic_slice {outside}, {places}, sizes = [{}] : ({}, {place_types}) -> {}",
                list(row.shape.iter()),
                types[1 + i],
                tensor(&row)
            ));
            let x = self.define(&format!("stablehlo.reshape {slice} : ({}) -> {}", tensor(&row), tensor(ty)));
            names.set(v, x);
        }
        self.nodes(body, &mut names);

        let mut next = vec![self.define(&format!("stablehlo.add {}, {one} : {counter}", inside[0]))];
        next.extend(body.outputs()[..scan.carry].iter().map(|&v| names.get(v).to_owned()));
        let invariant = 1 + scan.carry..1 + scan.carry + scan.xs + scan.consts;
        next.extend_from_slice(&inside[invariant.clone()]);
        for (i, &v) in body.outputs()[scan.carry..].iter().enumerate() {
            let ty = body.ty(v);
            let (places, place_types) = start(ty.shape.rank());
            let row = stacked(ty, 1);
            let all = &types[invariant.end + i];
            let y = self.define(&format!("stablehlo.reshape {} : ({}) -> {}", names.get(v), tensor(ty), tensor(&row)));
            next.push(self.define(&format!(
                "stablehlo.dynamic_update_slice {}, {y}, {places} : ({all}, {}, {place_types}) -> {all}",
                inside[invariant.end + i],
                tensor(&row)
            )));
        }
        next
    }
}
