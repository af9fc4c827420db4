"""The rules around math-verify, by cases that the bare library or a looser rule gets wrong."""

import random
import string
import time

from pytest import mark

from answers.equality import canonical, equal, extract_answer, gradable, number, read

# Each row is: gold <- answer.
EQUAL = r"""
# spelling
(2,\infty) <- (2,∞)
64 <- 2⁶
\frac{3}{4} <- ¾
\frac{9}{4} <- 2¼
x \ge 3 <- x ≥ 3
7 <- 7.
7 <- $7$
-7 <- −7
3\pi <- 3π
\sqrt{7} <- √7
\frac{\pi}{2} <- pi/2
-2\pi <- -2*pi
e^{16}-1 <- -1 + exp(16)
2\sqrt{3} <- 2*sqrt(3)
\sin(x) <- sin(x)
2^{10} <- 2**10
\sqrt{x+1} <- √(x+1)
8 <- \mathbf{8}
a^2 <- a²
\left(1,2\right) <- (1,2)
\frac{a}{b} <- \dfrac{a}{b}
e <- \mathrm{e}
\emptyset <- ∅
x_1 <- x₁
# numbers
\frac{3}{8} <- 0.375
\frac{3}{8} <- \frac38
\frac{11}{4} <- 2\frac{3}{4}
\frac{11}{4} <- 2 3/4
-\frac{5}{2} <- -2\frac12
\frac{3}{11} <- 0.\overline{27}
0.1\overline{6} <- \frac{1}{6}
1.6 \times 10^{-19} <- 1.6e-19
250000 <- 2.5\cdot10^5
10^{50} <- 100000000000000000000000000000000000000000000000000
\frac{20!}{2^5} <- \frac{20!}{32}
\sqrt{12} <- 2\sqrt{3}
3 <- \log_2 8
25 <- e^{2\ln 5}
\binom{6}{3} <- 20
\frac{\sqrt{3}}{3} <- \frac{1}{\sqrt{3}}
\frac{-1}{2} <- -\frac{1}{2}
+5 <- 5
042 <- 42
\sqrt{2}+\sqrt{3} <- \sqrt{5+2\sqrt{6}}
\log 6 <- \log 2+\log 3
\frac{1+\sqrt{5}}{4} <- \cos\frac{\pi}{5}
# separators
2500000 <- 2,500,000
2500000 <- 2{,}500{,}000
2500000 <- 2\,500\,000
20000 <- 20,\!000
1, 234 <- 234, 1
100,200 <- 200,100
# lists and sets
2,4,8 <- 8, 4, 2
2,4,8 <- \{2, 8, 4\}
2,4,8 <- 2, 4 \text{ and } 8
2,4,8 <- 2, 4, and 8
2,4 <- x=2 \text{ or } x=4
2,4 <- x = 4, 2
2,4 <- x \in \{2,4\}
2,4 <- 2,4,4
1,1,2 <- 2,1,1
\pm 3 <- 3,-3
\{-3,3\} <- x = \pm 3
1+\sqrt{2}, 1-\sqrt{2} <- 1 \pm \sqrt{2}
(1,2),(3,4) <- (3,4),(1,2)
\{5\} <- 5
P,Q <- Q, P
2;4 <- 2,4
# intervals and tuples
[0,\frac12] <- [0, 0.5]
(-\infty,0)\cup(1,2] <- (1,2] \cup (-\infty, 0)
(1,5) <- 1 < x < 5
[2,\infty) <- x \ge 2
3 \le n <- n \ge 3
a > b > c <- c < b < a
(1,2) <- (x,y)=(1,2)
(1,2,3) <- \langle 1,2,3 \rangle
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{bmatrix} 1 \\ 2 \end{bmatrix}
2 \le x < 3 <- [2,3)
(-\infty,\infty) <- \mathbb{R}
(0,3)\cup(3,9) <- (0,9)\setminus\{3\}
(-\infty,2)\cup(5,\infty) <- x<2 \text{ or } x>5
x\in[1,4] <- 1 \le x \le 4
x<2 \text{ or } x>5 <- (5,\infty)\cup(-\infty,2)
(-\infty,1)\cup(2,3)\cup(5,\infty) <- (-\infty,1)\cup(2,3) \text{ or } x>5
(-\infty,2)\cup(2,\infty) <- \mathbb{R}\setminus\{2\}
x>2a <- (2a,\infty)
# labels
x=5 <- 5
5 <- x = 5
5 <- = 5
f(x)=x^2 <- x^2
f(x)=2x <- f(t)=2t
11:21 <- V_1 : V_2 = 11 : 21
3 <- \angle ABC = 3
\frac{AB}{CD}=2 <- 2
5 <- x = 2 + 3 = 5
P(A)=\frac{1}{3} <- \frac{1}{3}
12 <- S_n = 12
10 <- |AB| = 10
4 <- \text{answer}=4
4 <- Answer=4
4 <- \text{total cost}=4
4 <- AB=4
4 <- f'(2)=4
4 <- area=4
B <- \text{Answer}=B
B <- x=B
a=3, b=4 <- 3, 4
3,4 <- a=3, b=4
(1,2) <- x=1, y=2
x=1, y=2 <- (1,2)
# equations
y=3x-2 <- 3x-y-2=0
0.3x <- 0.1x+0.2x
0.3+\sqrt{2} <- \sqrt{2}+0.1+0.2
2E+1 <- 1+2E
2e+1 <- 1+2e
2\Gamma+1 <- 1+2\Gamma
\Delta_1+x <- x+\Delta_1
x+2y-z=0 <- -x-2y+z=0
2 \cos x \sin y <- 2\sin y\cos x
(x-1)^2 <- x^2-2x+1
x^2+y^2=4 <- y^2+x^2=4
\frac{n(n+1)}{2} <- \frac{n^2+n}{2}
2-2i <- \frac{4}{1+i}
\binom{n}{2} <- {n \choose 2}
y'+2y=0 <- y^{\prime} + 2y = 0
\omega(v+1) <- \omega v + \omega
# units
5 <- 5 \text{ cm}
5\text{ cm} <- 5
12 \text{ km/h} <- 12 \text{ kilometers per hour}
45 <- 45^\circ
45^\circ <- 45 degrees
18 <- \$18
18 <- 18 \text{ dollars}
\$18 <- 18.00
30\% <- 30
30\% <- 0.3
0.3 <- 30\%
37.5\% <- \frac{3}{8}
37.5\% <- 37\frac{1}{2}\%
4\pi \text{ cm}^2 <- 4\pi
6 <- 6 \text{ apples}
10 \text{ m}^2 <- 10 \text{ square meters}
# units by their names
36\text{ dollars} <- \$36
3\text{ km} <- 3\text{ kilometers}
5\text{ m/s}^2 <- 5 \text{ meters per second}^2
9.8 <- 9.8\,\mathrm{m\,s^{-2}}
2\sqrt{3} <- 2\sqrt{3}\text{ cm}
5\text{ L} <- 5\text{ liters}
60 <- 60\text{ mph}
4 <- 4 children
1 <- 1\text{ way}
7\text{ apple} <- 7
4 <- 4\text{ apples per day}
4 <- 4\text{ red apples}
-\$5 <- -5
\frac12 <- \$\frac12
12 \text{ square feet} <- 12\text{ ft}^2
25 <- 25^\circ\text{C}
30\text{ percent} <- 30\%
# words
\text{Saturday} <- saturday
Saturday <- \textbf{Saturday}
\text{the circle} <- circle
(E) <- \text{(E)}
\text{no solution} <- No solution
# bases
1011_2 <- 1011_{2}
1011_2 <- 1011₂
# ratios
2:3 <- 4:6
2:3 <- 2 : 3
# other ways to write it
\frac12 <- \sin 30^\circ
\frac13 <- 0.\overline3
\frac16 <- 0.1\dot6
-2,2 <- x_1=2, x_2=-2
(1,2) <- y=2, x=1
15\text{ m/s} <- 15\frac{\text{m}}{\text{s}}
15\text{ m/s} <- 15 \mathrm{\ m\ s^{-1}}
(-\infty,2] <- \{x: x\le2\}
(1,2] <- \{ t \mid 1<t\le2 \}
-1 <- e^{i\pi}
# restated in the gold
\sum_{k=1}^n k^2 <- \sum_{k=1}^{n} k^{2}
\max(a,b) <- \max(a, b)
\begin{pmatrix}5/7\\12/7\end{pmatrix} <- \frac{1}{7}\begin{pmatrix} 5 \\ 12 \end{pmatrix}
# powers of ten with one digit, functions without brackets, a box of text, degrees, indices
1e-5 <- 10^{-5}
1.77e-6 <- 1.77 \times 10^{-6}
0.065 <- 6.5e-2
\sin x\cos x <- \sin x \cdot \cos x
3\ln 2 <- \ln 2 \cdot 3
e^x\sin x <- \sin x \cdot e^x
\sin^2 2x\cos x <- \sin^2 2x \cdot \cos x
\log_2 3\cdot\log_3 5 <- \log_2 5
\frac{\ln 3}{\ln 2} <- \ln 3/\ln 2
\frac{\log 2}{\log 2-\log 3} <- \log 2/(\log 2-\log 3)
18 <- \text{18 dollars}
18 <- \text{\$18}
18.5 <- \text{18.50}
1080 <- \textbf{1,080}
025 <- \textbf{25}
\frac{1}{4} <- \sin^{2} 30^\circ
\frac{3}{4} <- \cos^2(30^\circ)
\frac{\pi}{3} <- \frac\pi3
\frac{2}{\pi} <- \frac 2 \pi
\sqrt{\pi} <- \sqrt \pi
\frac13 E_{1}+\frac23 E_{2} <- \frac{E_1+2E_2}{3}
E_0+2 <- 2+E_0
4210_5 <- 4210_{(5)}
5 <- 5 sec
# products without a sign, transposes, greatest divisors, derivatives, units that are none
504 <- 2\binom{10}{5}
504 <- 2 \cdot \binom{10}{5}
\binom42\binom31 <- 18
18 <- \binom{4}{2} \times \binom{3}{1}
8 <- \binom{3}{0}+\binom{3}{1}+\binom{3}{2}+\binom{3}{3}
\sum_{k=0}^{3}\binom{3}{k} <- 8
60 <- 12(5)
15 <- \frac{5(6)}{2}
1 <- 2\left(\frac12\right)
6 <- (2)(3)
6 <- 2{3}
12 <- 3[4]
32 <- 2^3(4)
12 <- 2^{2}(3)
12 <- 3!(2)
\frac{1}{3} <- \frac12\frac23
\frac{3}{2} <- \frac12(3)
x+\frac52 <- x+2\frac12
25\pi <- \pi(5)^2
3(x+1) <- 3x+3
2(3x+1) <- 6x+2
2{,}500 <- 2500
m+n-\gcd(m,n) <- n+m-\gcd(m,n)
P(1+r)^T <- P(r+1)^T
\frac{dy}{dx}+2y=0 <- 2y+\frac{dy}{dx}=0
\mu mg <- mg\mu
\frac{3}{2} kT <- 1.5 kT
3\pi \text{ cm} <- 3\pi
5 cm <- 5
5 meters <- 5 Meters
\frac{x}{2} \text{ m} <- \frac{x}{2}
5\text{ mF} <- 5
y=2x <- y-2x=0
x=2 <- 2=x
No <- no
Yes <- \text{yes}
yes <- Yes
odd <- Odd
ABC <- \text{ABC}
\frac{ABC}{2} <- \frac12 ACB
\frac13 <- 0.\bar{3}
0.\overline{3} <- 0.\bar{3}
# found by a second attack: I and \gamma, arguments, products, votes, labels
I_1+I_2 <- I_2+I_1
x^{I} <- x^I
IR <- RI
I^2R <- RI^2
(\gamma-1)mc^2 <- \gamma mc^2-mc^2
\beta\gamma <- \gamma\beta
x\gamma+1 <- 1+\gamma x
PV^\gamma <- V^{\gamma}P
\sqrt{\pi} <- \Gamma(1/2)
2\sin\frac{x}{2}\cos\frac{x}{2} <- 2\sin\frac{x}{2}\cdot\cos\frac{x}{2}
\frac34 <- \sin\frac{\pi}{3}\cdot\cos\frac{\pi}{6}
3\ln 2 <- \ln{2}\cdot 3
y\ln|x| <- \ln|x|\cdot y
\frac{1}{2}\ln|x| <- \ln|x|/2
\sin x\cos x <- \sin{x}\cdot\cos{x}
1 <- \log_{3}{2}\cdot\log_{2}{3}
y\cos(\omega t) <- \cos \omega t\cdot y
\frac{\ln 3}{\ln 2} <- \ln{3}/\ln{2}
\ln\ln x <- \ln(\ln x)
\sin{\frac{x}{2}} <- \sin\frac x2
30 <- 5\cdot2(3)
504 <- 2\dbinom{10}{5}
504 <- 2\tbinom{10}{5}
\frac52\pi <- 2\frac12\pi
\frac52 x <- 2\frac12 x
12 <- \frac{6}{2}{4}
17 <- \frac{1}{2}34
5 <- 2\cdot2\frac12
3d <- d\cdot 3
2ad <- 2da
a+(n-1)d <- a+dn-d
d\sqrt{2} <- \sqrt{2}d
\frac{dy}{dx}+2y=0 <- 2y+\frac{dy}{dx}=0
\int_0^1 x dx <- \int_0^1 xdx
\frac32 <- \frac{1}{2}3
|x|^{2} <- |x|^2
1011_2 <- 1011_{2}
\frac{\log_{10} 25}{3} <- \frac13\log_{10}25
\log_2 3x <- \log_2(3x)
\log_2 35x <- \log_2(35x)
2\log_{10} 25 <- \log_{10} 25^2
y=3x-2 <- 3x-y-2=0
y=\frac1x <- xy=1
x=2a <- 2a=x
m=3, b=4 <- (3,4)
m=3, b=4 <- 3,4
m=3, b=4 <- b=4, m=3
(1,2) <- y=2, x=1
x=1,y=2 <- y=2,x=1
\frac12 <- \sin\left(30^\circ\right)
\frac12 <- \sin\left(30^{\circ}\right)
\frac12 <- \sin{30^\circ}
\frac12 <- \sin (30^\circ)
\frac12 <- (\sin 30^\circ)
\frac{1}{4} <- \sin^{2} \left( 30^\circ \right)
3\sqrt2 <- 3\sqrt{2} cm
5 <- 5 mg
5 <- 5 km/hr
\frac12 <- \frac{1}{2} hour
1000000 <- 1 000 000
12345 <- 12\ 345
1000 <- x = 1 000
x+1 <- f^{-1}(x)=x+1
f^{-1}(x)=x+1 <- x+1
5 <- f(-2)=5
5 <- f'(-2)=5
\sum_{i=1}^n i^2 <- \sum_{i=1}^{n} {i}^{2}
\sum_{i=1}^n i <- \frac{n(n+1)}{2}
5\sqrt2 \approx 7.07 <- 5\sqrt{2}\approx7.07
5 <- 5cm
2.5 kg <- 2.5kg
12 dm <- 12
3 kWh <- 3
3\text{ kWh} <- 3 kWh
\arctan 2 <- \operatorname{arctan} 2
\arctan x <- \operatorname{arctan}(x)
# by a third attack: indices in words, d, units in products, labels that are tuples, braces
\text{The circle} <- circle
\text{Black/White} <- black/white
m(v_{\text{f}}-v_{\text{i}}) <- m(v_{\text{f}}-v_{\text{i}})
k_{\text{B}}T <- k_BT
k_{\mathrm{B}}T\ln 2 <- k_B T\ln 2
v_{\text{max}} <- v_{max}
v_{init}+at <- at+v_{init}
I_{cm}+Md^2 <- I_{\text{cm}}+Md^2
5 <- v_{\text{max}}=5
5 <- x_{\max}=5
5 <- f_\min=5
5 <- x_{min}=5
F_{\mathrm{net}}=10 <- 10
m(v_{\text{f}}-v_{\text{i}}) <- mv_{\text{f}}-mv_{\text{i}}
\frac{V}{R_{\text{eq}}+r} <- \frac{V}{r+R_{\mathrm{eq}}}
\frac{n^2h^2}{8mL^2} <- \frac{h^2n^2}{8mL^2}
\frac{n^2\pi^2\hbar^2}{2mL^2} <- \frac{\hbar^2\pi^2n^2}{2mL^2}
\frac{\hbar^2}{2mL^2} <- \frac{\hbar^2}{2L^2m}
5 <- 5cm^2
5 <- 5\text{ m s}^{-1}
5 kg <- 5kg
5 <- 5mL
5 <- 5 \text{ cm}^{2}
(a,b)=(3,4) <- b=4,a=3
(a,b)=(3,4) <- a=3,b=4
(a,b)=(3,4) <- (b,a)=(4,3)
(1,2) <- (y,x)=(2,1)
m=3,b=4 <- (m,b)=(3,4)
m=3,b=4 <- (b,m)=(4,3)
(x,y,z)=(1,2,3) <- z=3,y=2,x=1
(1,2),(2,1) <- (x,y)=(1,2),(2,1)
(x,y)=(1,2),(2,1) <- (2,1),(1,2)
(x,y)=(1,2),(2,1) <- (x,y)=(2,1) \text{ or } (x,y)=(1,2)
(1,2),(2,1) <- (x,y)\in\{(1,2),(2,1)\}
(a,b)=(3,4) <- (3,4)
(x_1,x_2)=(1,2) <- (1,2)
\frac{ad}{bc} <- \frac{da}{cb}
\frac{d\sqrt{3}}{2} <- \frac{\sqrt{3}}{2}d
\frac{dh}{2} <- \frac12 dh
\frac{dv}{c} <- \frac{vd}{c}
L\frac{dI}{dt}+RI=0 <- RI+L\frac{dI}{dt}=0
\frac{d^2y}{dx^2}+y=0 <- y+\frac{d^2y}{dx^2}=0
vd/c <- \frac{dv}{c}
d/v <- \frac{d}{v}
YES <- yes
{{a}_{n}}=2n-1 <- 2n-1
{{a}_{n}}=2n-1 <- a_n=2n-1
\left( {{x}_{0}},{{y}_{0}} \right) <- (x_0,y_0)
{{x}^{2}}+1 <- 1+x^2
{{S}_{n}}={{2}^{n}}-1 <- 2^n-1
\frac{{{a}_{1}}}{2} <- \frac12 a_1
50\% <- 50 \text{ per cent}
0.5 <- 50 \text{ per cent}
\frac{18}{7} <- {2}\frac97
4 <- {4}\dbinom{1}{1}
30 <- 10[3]
300 <- 10[3]10
\sqrt[3]{2} <- \sqrt[3]2
\sqrt[3]{2}x <- x\sqrt[3]{2}
A\cos(2\pi ft) <- A\cos 2\pi ft
2\pi ft <- 2\pi tf
5 ft <- 5
3\sqrt{2} ft <- 3\sqrt2
3\pi \text{ ft} <- 3\pi
y=mx+b <- mx-y+b=0
y=ax^2 <- ax^2-y=0
90 \text{ km/h} <- 90 km/h
5 <- 5 m/s
20\text{ m/s} <- 20 m/s
E_{12}-E_{11} <- -E_{11}+E_{12}
2e_1+e_2 <- e_2+2e_1
e_{12}+1 <- 1+e_{12}
\gamma_1+1 <- 1+\gamma_1
\gamma_{12}+1 <- 1+\gamma_{12}
I_{12}+1 <- 1+I_{12}
\sqrt{\pi} <- \Gamma (1/2)
y''+2y <- 2y+y''
"""
DIFFERENT = r"""
# candidates behind a number, as if they were its unit
3 <- 3\text{, 4, 5, 6}
3 <- 3 \text{; the other root is 4}
4 <- 4 \text{ is wrong, 5 is right}
10 <- 10\text{ maybe 11 / 12}
\frac12 <- \frac{1}{2}\text{, 7}
1,2 <- 1\text{, 5},2
(1,2) <- (1\text{, 3},2)
x=3 <- x=3\text{, 4}
x>3 <- x > 3 \text{, x<5}
A <- A\text{, B, C, D}
\text{(A)} <- \text{(A)}\text{(B)}\text{(C)}
\text{even} <- \text{even} / \text{odd}
\text{Monday} <- \text{Monday} \text{Tuesday}
4 <- 4, ...
1,2 <- 1,2...
3 <- 3-\text{4}
3 <- 3/\text{4}
45 <- 4\text{5}
x^2 <- x^2\text{ + C}
\sqrt{2} <- \sqrt{2}\text{ plus one}
4 <- 4 million
4 <- 4 hundred
4 <- 4 squared
4 <- 4/two
4 <- 4 - five
4 <- 4-xy
2 <- 2 pi
5\text{ million} <- 5
# words that are no unit
4 <- 4\text{ xor eleven}
4 <- 4\text{ through nineteen}
4 <- 4\text{ fifths}
4 <- 4\text{ twelfths}
4 <- 4\text{ thousands}
4 <- 4\text{ millions}
4 <- 4\text{ dozens}
4 <- 4\text{ pairs}
4 <- 4\text{ lakh}
4 <- 4\text{ doubled}
4 <- 4\text{ negative}
4 <- 4\text{ reciprocal}
4 <- 4\text{ less than}
4 <- 4\text{ incorrect}
4 <- 4\text{ false}
4 <- 4\text{ never}
4 <- 4\text{ elevens}
4 <- 4\text{ halves}
4 <- 4\text{ negative apples}
4 <- 4\text{ twenty apples}
4 <- 4\text{ fewer apples}
4 <- 4\text{ minus apples}
4 <- 4\text{ inverses}
4 <- 4\text{ whatever}
4 <- 4 eleven
4 <- 4 less
# labels that are none
4 <- \not= 4
4 <- \text{not}=4
4 <- \text{anything but}=4
4 <- \pi=4
4 <- e=4
4 <- \infty=4
4 <- \sin=4
4 <- xy=4
4 <- \frac{x}{y}=4
4 <- x/y=4
4 <- f(2x)=4
4 <- f(x+1)=4
4 <- \approx 4
4 <- x \approx 4
\{1,2\} <- \not\in\{1,2\}
\{1,2\} <- x\notin\{1,2\}
(-\infty,1)\cup(2,\infty) <- x<1 \text{ or } y>2
4 <- NOT=4
4 <- NO=4
4 <- \text{Not}=4
4 <- \text{neither}=4
4 <- \text{unequal to}=4
4 <- \text{twice x}=4
4 <- \text{x plus one}=4
4 <- \text{opposite of answer}=4
4 <- sqrt=4
4 <- double=4
4 <- Half=4
4 <- x'=4
4 <- INV=4
4 <- \text{wrong answer}=4
4 <- \text{sum of x and one}=4
4 <- \text{number of fives}=4
B <- A=B
B <- A \in B
\text{Alice} <- \text{Bob}=\text{Alice}
\text{even} <- \text{neither}=\text{even}
even <- odd=even
4 <- NOT=2+2=4
y=5=6 <- 5
5 <- x=2+3=6
x>a <- x \ge a
# points that are no intervals
(2,1) <- \emptyset
(0,0) <- ∅
\emptyset <- (2,1)
(3,2) <- (9,1)\cup(8,1)
(3,2) <- (5,4)\setminus(0,1)
(5,3),(2,1) <- \emptyset,\emptyset
\{1,3\}\cup(5,6) <- (3,1)\cup(5,6)
# sets of sets
\emptyset <- \{\emptyset\}
\{\{1\},\{2\}\} <- \{1,2\}
1,2 <- \{1\},\{2\}
[0,1] <- \{[0,1]\}
# digits glued
45 <- 4$5
45 <- 4\)\(5
45 <- 4\left5
45 <- 4\limits5
4 <- ٤
4 <- ４
\frac13 <- 0.\overline{٣}
4 <- 4'
# units that differ
10\text{ N} <- 10\text{ kN}
10\text{ mW} <- 10\text{ MW}
10\text{ eV} <- 10\text{ J}
30^\circ <- 30\text{ C}
5\text{ hours} <- 5\text{ blips}
10\text{ acres} <- 10\text{ hectares}
12:30 <- 2:5
# rounded
\frac{2}{3} <- 0.6667
\sqrt{5} <- 2.2360679775
\pi <- 3.14159265358979323846264338327950288419716939937510582097494459
1000000 <- 1000001
0 <- 10^{-300}
\frac{1}{1000!} <- \frac{1}{1001!}
\frac{22}{7} <- \pi
12345678901234567890 <- 12345678901234567891
\frac{1}{2004!} <- 0
2^{100} <- 2^{100}+1
33.3 <- \frac{100}{3}
e^{1000} <- e^{1000}+1
5 <- 5+e^{-999}
5 <- \sqrt{25+e^{-999}}
10^{50} <- \sqrt{10^{100}+1}
\pi^{200} <- \pi^{200}+1
y=2x+1 <- y-2x-1=10^{-50}
\sqrt{2}x <- 1.4142135623730950488016887242096980785696718753769x
x+y <- (1+10^{-70})x+y
\pi i <- (\pi+10^{-99})i
# candidates
4 <- 4, 5
4 <- 4 \text{ or } 5
4 <- 4 \lor 5
4 <- 5 \\ 4
4 <- 5 \quad 4
4 <- \{4,5\}
4 <- \pm 4
4 <- (4,4)
4 <- 4;5
4 <- [3,5]
4 <- 3 < x < 5
4 <- [4,4]
4 <- x \ge 4
4 <- \mathbb{N}
2,4 <- 2,3,4
2,4 <- 2
4 <- 4 = 5
4 <- 4 \ne 5
4 <- 5 \approx 4
(1,2) <- (1,2) \text{ or } (2,1)
4 <- 4 or 5
4 <- 5 and 4
4 <- 4 \text{ if } x>0, 5 \text{ otherwise}
(1,2) <- x=1, y=3
2:3 <- 6:12
9 <- 9)(
9 <- 9, 9]
# restated
2 <- 2x = 4
2 <- x^2 = 4
2 <- x - 2 = 0
2 <- x+x=4
-2 <- \det\begin{pmatrix}1&2\\3&4\end{pmatrix}
\frac13 <- \int_0^1 x^2 dx
55 <- \sum_{k=1}^{10} k
55 <- 1+2+\cdots+10
7 <- \max(3,7)
1 <- \lim_{x\to 0} \frac{\sin x}{x}
6 <- \gcd(12,18)
24 <- \prod_{k=1}^4 k
x>1 <- x^2>x
2 <- f(x) = 2x
-2 <- \begin{vmatrix}1&2\\3&4\end{vmatrix}
# shapes
1,2,3 <- (1,2,3)
(1,2) <- \{1,2\}
[1,2] <- (1,2)
(1,2] <- [1,2)
(1,2) <- (2,1)
(1,2) <- (1,2,3)
1,1,2 <- 1,2
(-\infty,0)\cup\{3\} <- (-\infty,0)
\begin{pmatrix}1\\2\end{pmatrix} <- \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} <- \begin{pmatrix}1&3\\2&4\end{pmatrix}
(1,2),(3,4) <- 1,2,3,4
(4,345,346) <- 4345346
(0,3)\cup(3,9) <- (0,9)
(0,3)\cup(3,9) <- (0,3),(3,9)
(-\infty,1)\cup(2,3) <- (-\infty,1)\cup(2,3) \text{ or } x>5
x<1 <- 1:2
x \ge 2 <- x > 2
x < 2 <- y < 2
(1,5) <- 1 \le x < 5
# names
E <- e
2E+1 <- 2e+1
2e+1 <- 20
i <- I
2i+1 <- 2I+1
xE <- xe
\delta <- \Delta
\phi <- \Phi
\omega <- \Omega
\gamma <- \Gamma
\sigma x <- \Sigma X
2\lambda+1 <- 2\Lambda+1
2\gamma+1 <- 2\Gamma+1
k <- K
5n <- 5
5 <- 5n
x+1 <- y+1
x=5 <- y=5
f(x)=x <- g(x)=x
f'(x) <- f(x)
x_1 <- x_2
f(1)<f(2) <- f(2)<f(1)
1 <- I
0 <- O
1 <- l
5 <- S
x <- х
1011_2 <- 1011
1011_2 <- 1011_3
11 <- 1011_2
13 <- 1₃
# other ways that are none
\frac12 <- \sin 30
\sin 30 <- \sin 30^\circ
\frac{1}{33} <- 0.\overline3
0.123 <- 0.\dot12\dot3
(2,1) <- x=1, y=2
(1,2) <- x=1, 2
(1,2) <- x=1, x=2
x_1=-2,x_2=2 <- x_1=2,x_2=-2
a=1,b=2 <- 2,1
(-\infty,2] <- \{x: y\le2\}
15\text{ m/s} <- 15\text{ m s}
\{1,2\} <- \{x : 1,2\}
# drawn or left over
4 <- \phantom{4}
4 <- 4\mod 7
4 <- 4 \pmod 7
# glue
15 <- 1 \text{ and } 5
15 <- 1 \text{cm} 5
1234 <- 12,34
34 <- 3,4
3,4 <- 34
15 <- 1 5
15 <- 1\%5
7 <- 3 4
2^{12} <- 212
# units
20 \text{ km/h} <- 20 \text{ m/s}
5\text{ cm} <- 5\text{ m}
45^\circ <- \frac{\pi}{4}
30\% <- 3000
50\% <- 0.5\%
5\text{ cm} <- 0.05
30 <- 0.3
\$5 <- 5 \text{ cents}
30\% <- 13\%
30^\circ <- 30\%
5\text{ €} <- \$5
4\text{ cm}^2 <- 4\text{ cm}^3
4 <- 4\text{^2}
\text{even} <- \text{even}\text{ cm}
5 <- 5\text{ 3}
4 <- 4\text{/}
# words
\text{Anna} <- \text{Bob}
B <- ABCDE
\text{undefined} <- 0
5 <- \text{answer}
5 <- \text{five}
0 <- \frac{0}{0}
1 <- \text{True}
# algebra
\frac{1}{0} <- \frac{2}{0}
2^{k-1} <- 2^k-1
a^b <- ab
\lfloor n/2 \rfloor <- \lceil n/2 \rceil
(x+1)^2 <- x^2+1
1-\frac1e <- 1+\frac1e
-x <- x
2:3 <- 3:2
# hostile
1 <- exec('1')
1 <- __import__('os')
1 <- nan
# what a function without brackets takes is not all that follows; other indices, 2e - 1
\ln 6 <- \ln 2 \cdot 3
\ln(10) <- \ln 2 \times 5
1 <- \log 2 \cdot 5
\log_2 6 <- \log_2 3 \cdot 2
\cos(x\sin x) <- \cos x \cdot \sin x
E_1 <- E_2
E_1 <- e_1
\sin(xy) <- \sin x*y
\ln(2x_1) <- \ln x_1\cdot 2
\arcsin(xy) <- \arcsin x\cdot y
X_{(1)} <- X_1
E_1+E_2 <- e_1+e_2
0.2 <- 2e-1
18 <- \text{18 or 19}
# added up, transposed, derived, put in, to be solved: the same as above
7 <- 3(4)
5 <- 2(3)
17 <- 12(5)
\frac{11}{2} <- \frac{5(6)}{2}
\frac52 <- 2\left(\frac12\right)
7 <- (3)(4)
7 <- 3[4]
5 <- 2{3}
5 <- 2\{3\}
254 <- 2\binom{10}{5}
\binom{4}{2}\binom{3}{1} <- 9
12 <- 2^3(4)
7 <- 2^{2}(3)
8 <- 3!(2)
\frac{7}{2} <- \frac12(3)
10\pi <- 2\pi(5)^2
0.36 <- 1.2.3
m+n-\gcd(m,n) <- m+n-1
m+n-\gcd(m,n) <- m+n-\gcd(m,k)
\frac{mn}{\gcd(m,n)} <- mn
\operatorname{lcm}(m,n) <- mn
P(1+r)^T <- P(1+r)
2^T <- 2
e^{T} <- e
A^{T}A <- A^2
\frac{dV}{dt}=kV <- kV=0
\frac{dy}{dx}+2y=0 <- 2y=0
\frac{dy}{dx} <- 0
\frac{\partial f}{\partial x} <- \frac{\partial f}{\partial y}
2x <- \frac{d x^2}{dx}
2x <- \frac{d(x^2)}{dx}
2x <- \frac{\mathrm{d}}{\mathrm{d}x}x^2
10 <- (x^2+3x)|_{x=2}
10 <- \left.(x^2+3x)\right|_{x=2}
\mu mg <- \mu
\mu_k mg <- \mu_k
\alpha mm <- \alpha
\frac{3}{2} kT <- \frac32
5\text{ mF} <- 5\text{ MF}
5\text{ mH} <- 5\text{ MH}
x=2 <- x+3=5
x=2 <- x-2=0
CAB <- ABC
No <- on
# the same, that were right
I_1 <- I_2
I_1+I_2 <- 2I_1
1+\frac{I_1}{2} <- 1+\frac{I_2}{2}
i <- I_1
ki <- kI
1 <- \gamma+1
24 <- \gamma+5
24 <- \gamma(5)
\gamma_1+1 <- \gamma_2+1
\frac{\Gamma(1/4)^2}{4} <- \Gamma(1/2)^2/16
\sin x <- \sin\frac{x}{2}\cdot 2
\ln 6 <- \ln{2}\cdot 3
\ln 6 <- \ln\sqrt{4}\cdot 3
\ln(xy) <- \ln{x}y
\ln(|x|y) <- \ln|x|\cdot y
\ln 6 <- \ln[2]\cdot 3
\cos 2x <- \cos{x}2
\sin(x\cos x) <- \sin{x}\cdot\cos{x}
\sin(\pi xy) <- \sin \pi x\cdot y
\ln\frac{|x|}{2} <- \ln|x|/2
7 <- {3}(4)
7 <- {3}{4}
5 <- [2][3]
7 <- \frac{6}{2}{4}
25 <- 5\cdot2(3)
254 <- 2\dbinom{10}{5}
9 <- \binom{4}{2}{3}
\pi <- 2\frac12\pi
x <- 2\frac12 x
\frac{dy}{dx}+2y=0 <- 2y=0
\frac{1}{23} <- \frac{1}{2}3
10 <- (x^2+3x)|^{x=2}
10 <- (x^2+3x)| _{x=2}
13 <- 13 _5
\frac{\log_{10} 25}{3} <- \frac{\log_{10} 7}{3}
0 <- \log_2 2.5
t=\frac{v-u}{a} <- v=u+at
x=\frac{b}{a} <- ax=b
h=\frac{2A}{b} <- A=\frac{1}{2}bh
F=\frac{9}{5}C+32 <- C=\frac59(F-32)
x=\sqrt{2}+1 <- x-1=\sqrt{2}
z=1+i <- z-1=i
m=3, b=4 <- (4,3)
m=3, b=4 <- 4,3
m=3, b=4 <- m=4, b=3
\frac{1}{3} mL^2 <- \frac13
\frac{1}{12}\,mL^2 <- \frac{1}{12}
2\pi hr <- 2\pi
\frac{5}{2} mg <- \frac52
\frac{1}{2} kA^2 <- \frac12
1000 <- 1 0 0 0
x_1 234 <- x_{1234}
4 <- x^{-1}=4
4 <- f(x+1)=4
\sum_{i=1}^n i <- \frac{n(n-1)}{2}
5\sqrt2 \approx 7.07 <- 5\sqrt2 \approx 9
5 cm <- 5mm
5x <- 5cm
# the same, that were right
m(v_{\text{f}}-v_{\text{i}}) <- m v_{\text{f}}-v_{\text{i}}
M_{\text{sun}} R <- m_{\text{sun}} r
k_{\text{B}} \ln\Omega <- k_{\text{B}} \ln\omega
\frac{1}{2}(v_{\text{A}}+v_{\text{B}}) <- \frac{1}{2} v_{\text{A}}+v_{\text{B}}
f'(x)+\text{C} <- f(x)+\text{C}
(x+\text{C})^2 <- x+\text{C}^2
1-(T_{\text{C}}/T_{\text{H}}) <- 1-(T_{\text{c}}/T_{\text{h}})
2 (abcd+1) <- 2 abcd+1
k_{\text{B}}T <- K_BT
v_{\text{max}} <- v_{\text{min}}
1011_{\text{two}} <- 1011
5 <- v_{\text{max}}=6
7 <- max(3,7)
5 <- x_{\max}=6
2(v_{init}+a) <- 2v_{init}+a
2mL^2 <- 2
2 <- 2mL^2
2kg^2 <- 2
(a,b)=(3,4) <- b=3,a=4
m=3,b=4 <- (b,m)=(3,4)
(1,2) <- (y,x)=(1,2)
(x,y)=(1,2) <- (y,x)=(1,2)
1,2 <- (x,y)=(1,2)
(x,y)=(1,2) <- (a,b)=(1,2)
(x,y)=(1,2) <- 1,2
dy/dx=2x <- y/x=2x
L dI/dt <- L I/t
\frac{dy}{dx}=x <- \frac{y}{x}=x
d\phi/dt+1 <- \phi/t+1
ABC <- abc
abc <- ABC
x_{a}b <- x_ba
5 <- 50\text{ per cent}
\frac{23}{7} <- {2}\frac97
5 <- {4}\dbinom{1}{1}
130 <- 10[3]10
2\pi ft <- 2\pi
A\cos 2\pi ft <- A\cos 2\pi
5 \text{ m/s} <- 5 km/h
5 <- 5x/s
E_{12}+1 <- E_{21}+1
e_1+1 <- e_2+1
e_{12}+1 <- e_{21}+1
\gamma_{12}+1 <- \gamma_{21}+1
I_{12}+1 <- I_{21}+1
y''+2y <- y'+2y
"""
UNPRINTABLE = ["5\x1c", "\x0b5", "5\x85", "\u202e5\u202c", "\x00", "(" * 500 + "5" + ")" * 500]
UNPRINTABLE += ["-" * 400 + "5", "{" * 300 + "5" + "}" * 300]


def cases(table):
    rows = table.strip().split("\n")
    return [row.split(" <- ") for row in rows if not row.startswith("# ")]


@mark.parametrize("gold, answer", [*cases(EQUAL), ("7", "\u200b7")])
def test_equal(gold, answer):
    assert equal(gold, answer)


@mark.parametrize("gold, answer", [*cases(DIFFERENT), *(("5", a) for a in UNPRINTABLE)])
def test_different(gold, answer):
    assert not equal(gold, answer)


def test_powers_of_ten_are_exact_within_bounds():
    """Votes are counted outside the workers. The fraction 10^(10^9) would take the run's memory."""
    assert number("10^{3000}") == 10**3000
    assert number("10^{4001}") is None and number("1e-4001") is None


MEET = r"""
\frac{1}{2} | \dfrac{1}{2} | $\frac{1} {2}$ | \tfrac{1}{2}. | 0.5
25 | 025
1,2 | 2,1 | \{1,2\} | x=2, x=1
B | \text{B} | \text{(B)}
x=5 | 5 | 5.0
5\text{ km} | 5\text{ kilometers}
(1,0.5) | (1, \frac12)
(b,a)=(2,1) | (a,b)=(1,2)
"""


@mark.parametrize("row", MEET.strip().split("\n"))
def test_canonical_answers_meet(row):
    assert len({canonical(answer) for answer in row.split(" | ")}) == 1


APART = r"5 m | 5 km | 5 | -5 | 4 | 4\% | 2x=4 | x<4 | x=y | (1,2) | (2,1) | [1,2] | 1,2 | B | b"


def test_canonical_answers_stay_apart():
    """Votes for wrong answers must not count for the right one."""
    answers = APART.split(" | ")
    assert len({canonical(answer) for answer in answers}) == len(answers)


def test_more_digits_than_python_writes_are_no_error():
    """A gold answer of 5,000 digits ended in a traceback, before any clock."""
    assert not gradable(rf"0.\overline{{{'1' * 5000}}}")
    assert canonical("9" * 900 + "e3999") == "9" * 900 + "e3999"


def test_canonical_takes_any_text_in_little_time():
    """It runs in the process of the training run, where nothing limits it."""
    monsters = ["((" * 99, "a" * 199, r"\text{" * 30, "x," * 99, "((((1,2),3),4),5)", "=" * 150]
    monsters += ["1" * 150 + "/0", r"\pm" * 60, "", "a b " * 49 + "=1", "4" + " orxt" * 21 + "{"]
    monsters += [
        "(" * 5000,
        "9" * 100_000,
        r"\frac{" * 200,
        "\x00\ud800",
        "9^{9^{9^{9}}}",
        "1," * 500,
    ]
    start = time.process_time()
    for monster in monsters:
        assert isinstance(canonical(monster), str)
    assert time.process_time() - start < 1


PIECES = r"""
\ \frac \frac{ \frac12 \text \text{ \text{a} \sqrt \begin{ \begin{a} \end{a} \boxed \boxed{ \left
\right \{ \} \[ \] \( \) \, \! \; \$ \% ^\circ \sin \not \in \pm \cup \setminus \overline{ \dot
\times \cdot \choose \mathrm{ \mathbf{ \mathbb \langle \le \mid \prime \angle 10^ {,} 1, ,000 1e
0. and or cm m/s red x= x_1 x_{ A: </think> <think> ^{ _{
"""


def monotonous():
    """Texts of about 2,000 characters: one piece again and again, and two in turn."""
    pieces = [*string.printable, *PIECES.split(), "; ", " or ", "1 ", r" \text{a} "]
    rng = random.Random(0)
    pairs = ["".join(rng.sample(pieces, 2)) for _ in range(50)]
    for piece in pieces + pairs:
        run = piece * (2000 // len(piece))
        yield run
        yield f"1{run}1"


def seconds(function, text):
    """Of processor time."""
    read.cache_clear()
    start = time.process_time()
    function(text)
    return time.process_time() - start


@mark.parametrize("function", [canonical, gradable, extract_answer])
def test_repetition_takes_no_time(function):
    """What no clock limits is linear in practice: a pattern took 0.5 s for 800 commas, and eight
    times as long for twice as many."""
    for text in monotonous():
        # The better of two, since the machine may be busy.
        assert seconds(function, text) < 0.05 or seconds(function, text) < 0.05, text[:20]
